"""What the tests share: the two tiny bases, small data, and the command line in this process."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test waits for a network
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import make_tiny_blip2  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import processors  # noqa: E402
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor  # noqa: E402

import finetune  # noqa: E402

MISTAKES = pytest.StashKey[list]()
torch.set_num_threads(1)  # several times faster for models as tiny as these


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in (item for item in items if "gpu" in item.keywords):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def report(request):
    """report(mistake, usual, ours): a row of the table that is printed after the tests."""
    rows = request.config.stash.setdefault(MISTAKES, [])
    return lambda *row: rows.append(row)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(MISTAKES, [])
    for row in [("in the usual recipes", "there", "here"), *rows] if rows else []:
        terminalreporter.write_line("| " + " | ".join(row) + " |")


@pytest.fixture(scope="session")
def opt_base() -> str:
    """The tiny BLIP-2 of the repository: OPT kind, trained."""
    return str(HERE / "tiny_blip2")


@pytest.fixture(scope="session")
def t5_base(opt_base, tmp_path_factory) -> str:
    """A random BLIP-2 with a T5, laid out as Flan-T5: </s> ends, pad starts the decoder."""
    folder = tmp_path_factory.mktemp("tiny_blip2_t5")
    processor = Blip2Processor.from_pretrained(opt_base)
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    config = Blip2Config.from_pretrained(opt_base).to_dict()
    config["text_config"] = {
        "model_type": "t5", "d_model": 128, "d_kv": 32, "d_ff": 128, "num_layers": 2,
        "num_heads": 4, "vocab_size": len(tokenizer), "feed_forward_proj": "gated-gelu",
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False,
    }  # fmt: skip
    config.pop("architectures")
    torch.manual_seed(1)
    Blip2ForConditionalGeneration(Blip2Config(**config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["opt", "t5"])
def any_base(request) -> str:
    """Both kinds, one after the other."""
    return request.getfixturevalue(f"{request.param}_base")


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample drawn anew: users replace the one in train/."""
    folder = tmp_path_factory.mktemp("train")
    make_tiny_blip2.write_sample(folder)
    return folder


@pytest.fixture
def small_data(tmp_path, sample) -> Path:
    """Three captions of the sample with four pictures each: a TRAIN_DIR of its own."""
    folder = tmp_path / "data"
    (folder / "caption").mkdir(parents=True)
    for text in sorted((sample / "caption").glob("*.txt"))[::6]:
        shutil.copy(text, folder / "caption")
        (folder / "Image" / text.stem).mkdir(parents=True)
        for picture in sorted((sample / "Image" / text.stem).iterdir())[:4]:
            shutil.copy(picture, folder / "Image" / text.stem)
    return folder


@pytest.fixture
def command(tmp_path, capsys):
    """finetune.main: command("--check", TRAIN_DIR=..., EPOCHS=1) -> (code, stdout, stderr).

    OUTPUT_DIR is a new folder unless it is given.
    """

    def call(*flags: str, **settings) -> tuple[int, str, str]:
        settings = {"OUTPUT_DIR": tmp_path / "out"} | settings
        capsys.readouterr()
        code = finetune.main([*flags_of(settings), *flags])
        return code, *capsys.readouterr()

    return call


def flags_of(settings: dict) -> list[str]:
    """{"BATCH_SIZE": 4, "LOAD_IN_4BIT": False} as --batch-size 4 --no-load-in-4bit."""
    words = []
    for name, value in settings.items():
        flag = name.lower().replace("_", "-")
        yes_or_no = [f"--{'' if value else 'no-'}{flag}"]
        words += yes_or_no if isinstance(value, bool) else ["--" + flag, str(value)]
    return words


@pytest.fixture
def build(tmp_path):
    """What a run has made when its training starts: settings, pairs, captioner, dataset, learner.

    LoRA's B is not zero, which would hide errors in the gradient of A.
    """

    def make(model_id: str, train_dir, **settings) -> SimpleNamespace:
        settings = finetune.parse_arguments(flags_of({
            "MODEL_ID": model_id, "TRAIN_DIR": train_dir, "OUTPUT_DIR": tmp_path / "out",
            "LOAD_IN_4BIT": False, "LORA_RANK": 8, "LORA_ALPHA": 16.0, "LORA_DROPOUT": 0.0,
            "DEVICE": "cpu"} | settings))
        finetune.check_settings(settings)
        pairs, _ = finetune.find_pairs(settings.TRAIN_DIR)
        captioner = finetune.load_captioner(settings)
        folder = tmp_path / "features" / finetune.hash_vision_side(captioner)
        folder.mkdir(parents=True, exist_ok=True)
        slots, _ = finetune.encode_pictures(captioner, [pair.picture for pair in pairs],
                                            settings.TRAIN_DIR, folder, 1)
        dataset = finetune.ImageCaptioningDataset(pairs, slots, captioner)
        torch.manual_seed(3)
        adapter = finetune.add_lora(captioner.model, settings.LORA_TARGETS, settings.LORA_RANK,
                                    settings.LORA_ALPHA, settings.LORA_DROPOUT)
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        learner = finetune.Learner(captioner, adapter, settings.WEIGHT_DECAY)
        return SimpleNamespace(settings=settings, pairs=pairs, captioner=captioner, slots=slots,
                               dataset=dataset, adapter=adapter, learner=learner)

    return make
