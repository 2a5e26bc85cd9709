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
from transformers import (  # noqa: E402
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
)

import finetune  # noqa: E402

MISTAKES = pytest.StashKey[list]()
torch.set_num_threads(1)  # several times faster for models as tiny as these


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
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

    OUTPUT_DIR is a new folder unless it is given, and nothing is read in other processes.
    """

    def call(*flags: str, **settings) -> tuple[int, str, str]:
        settings = {"OUTPUT_DIR": tmp_path / "out", "NUM_WORKERS": 0} | settings
        words = [part for name, value in settings.items()
                 for part in ("--" + name.lower().replace("_", "-"), str(value))]
        capsys.readouterr()
        code = finetune.main([*words, *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def build(tmp_path):
    """What a run has made when its training starts: base, store, tokenized, dataset, model."""

    def make(model_id: str, train_dir, in_4bit=False, prompt="", limit=64, dropout=0.0,
             targets="attention") -> SimpleNamespace:  # fmt: skip
        pairs, _, _ = finetune.find_pairs(str(train_dir))
        base = finetune.load_base(model_id, prompt, "cpu", "auto", in_4bit)
        store = finetune.open_features(base, str(train_dir), str(tmp_path / "features"))
        finetune.encode_pictures(base, store, [pair.picture for pair in pairs], 0)
        captions = [pair.caption for pair in pairs]
        tokenized, _ = finetune.tokenize_captions(captions, base, prompt, limit)
        dataset = finetune.ImageCaptioningDataset(pairs, store, tokenized, base)
        torch.manual_seed(3)
        model = finetune.add_lora(base.model, targets, 8, 16.0, dropout)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero as it comes, which would hide errors in lora_A's gradient
                torch.nn.init.normal_(parameter, std=0.05)
        return SimpleNamespace(pairs=pairs, base=base, store=store, tokenized=tokenized,
                               dataset=dataset, model=model)  # fmt: skip

    return make
