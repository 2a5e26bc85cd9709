"""What the tests share: the two tiny bases, small data, and the command line in this process."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test waits for a network
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import make_tiny_blip2  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import (  # noqa: E402
    Case,
    assert_case,
    copy_small,
    flags_of,
    forget_the_device,
    read_listing,
    snapshot,
    write_files,
)
from safetensors.torch import save_file  # noqa: E402
from tokenizers.processors import TemplateProcessing  # noqa: E402
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor  # noqa: E402

import finetune  # noqa: E402

finetune.DEVICE = "cpu"  # also where there is a GPU; a test for another device names it
torch.set_num_threads(1)  # several times faster for models as tiny as these


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


# ---- The table of mistakes ----------------------------------------------------------------------


@pytest.fixture
def report(record_property):
    """report(mistake, usual, ours): a row of the table that is printed after the tests."""

    def add_row(mistake: str, usual: str, ours: str) -> None:
        record_property("mistake", [mistake, usual, ours])

    return add_row


def pytest_terminal_summary(terminalreporter):
    rows = []
    for test in terminalreporter.getreports("passed"):
        _, line, _ = test.location  # several processes of pytest-xdist end in any order
        for name, row in test.user_properties:
            if name == "mistake" and test.when == "call":
                rows.append((line, row))
    if not rows:
        return
    table = [["mistake", "usual recipe", "finetune.py"], *(row for _, row in sorted(rows))]
    for row in table:
        terminalreporter.write_line("| " + " | ".join(row) + " |")


# ---- Models -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def opt_base() -> str:
    """The tiny BLIP-2 of the repository: OPT kind, trained."""
    return str(HERE / "tiny_blip2")


@pytest.fixture(scope="session")
def t5_base(opt_base, tmp_path_factory) -> str:
    """A BLIP-2 with a T5 and random weights, in the layout of the published Flan-T5 ones.

    Its head has weights of its own; encoder and decoder use the shared embedding, so that the file
    has none for them. Pad starts the decoder, </s> ends a text.
    """
    folder = tmp_path_factory.mktemp("tiny_blip2_t5")
    processor = Blip2Processor.from_pretrained(opt_base)
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    processor.save_pretrained(folder)

    opt_config = json.loads(Path(opt_base, "config.json").read_text())
    config = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": opt_config["num_query_tokens"],
        "image_token_index": opt_config["image_token_index"],
        "use_decoder_only_language_model": False,
        "vision_config": opt_config["vision_config"],
        "qformer_config": opt_config["qformer_config"],
        "text_config": {
            "model_type": "t5",
            "is_encoder_decoder": True,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 128,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.pad_token_id,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    # Written by hand: transformers would tie the head to the embedding, and not save it.
    torch.manual_seed(1)
    model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(folder))
    model.bfloat16().float()  # rounded, so that a model has the same 4-bit weights in every dtype
    weights = model.state_dict()
    embedding = weights["language_model.shared.weight"]
    weights["language_model.lm_head.weight"] = 0.1 * torch.randn_like(embedding)
    del weights["language_model.encoder.embed_tokens.weight"]
    del weights["language_model.decoder.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["opt", "t5"])
def any_base(request) -> str:
    """Both kinds, one after the other."""
    return request.getfixturevalue(f"{request.param}_base")


# ---- Data ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample of drawings, made again, because users replace the one in train/."""
    folder = tmp_path_factory.mktemp("train")
    make_tiny_blip2.write_sample(folder)
    return folder


@pytest.fixture
def small_data(tmp_path, sample) -> Path:
    """Three captions of the sample with four pictures each: a TRAIN_DIR of its own."""
    return copy_small(sample, tmp_path / "data")


# ---- The script ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_device_of_an_earlier_test():
    """On a machine with a GPU, a test on the CPU may follow one on the GPU."""
    yield
    forget_the_device()


@pytest.fixture
def command(tmp_path, capsys):
    """finetune.main: command("--check", TRAIN_DIR=..., EPOCHS=1) -> (code, stdout, stderr).

    OUTPUT_DIR is a new folder unless it is given.
    """

    def call(*flags: str, **settings) -> tuple[int, str, str]:
        settings = {"OUTPUT_DIR": tmp_path / "out"} | settings
        capsys.readouterr()  # what was printed before does not count
        code = finetune.main([*flags_of(settings), *flags])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def check(command, tmp_path):
    """check(folder, EPOCHS=1) -> code, out, err, pairs, skipped of --check.

    It must write nothing, and needs no model.
    """

    def call(folder: Path, *flags: str, **settings) -> SimpleNamespace:
        before = snapshot(tmp_path)
        settings = {"TRAIN_DIR": folder, "MODEL_ID": "no-such/model"} | settings
        code, out, err = command("--check", *flags, **settings)
        assert snapshot(tmp_path) == before
        pairs, skipped = read_listing(out, folder)
        return SimpleNamespace(code=code, out=out, err=err, pairs=pairs, skipped=skipped)

    return call


@pytest.fixture
def check_case(check, monkeypatch, tmp_path):
    """check_case(case): writes the files of a helpers.Case, and --check must say what it expects.

    The folder is given as "data", so that no word of the test's own folder is in a message.
    """

    def call(case: Case) -> None:
        monkeypatch.chdir(tmp_path)
        write_files(Path("data"), case.files)
        assert_case(case, check(Path("data")))

    return call


@pytest.fixture
def refused(command, tmp_path):
    """refused("--caption", ..., EPOCHS=1) -> the error that the command ends with.

    It must be one sentence, or a list of them, and leave alone all files that are there.
    """

    def call(*flags: str, **settings) -> str:
        before = snapshot(tmp_path)
        code, _, err = command(*flags, **settings)
        after = snapshot(tmp_path)
        assert code == 1
        for path, state in before.items():
            if not path.is_dir():
                assert after[path] == state
        for path in after.keys() - before.keys():
            assert path.suffix == ".lock" or ".features" in str(path)

        sentence = err[err.index("error: ") :]
        _, *more_lines = sentence.splitlines()
        assert all(line.startswith("  ") for line in more_lines), sentence
        return sentence

    return call


@pytest.fixture
def build(tmp_path):
    """What a run has made when its training starts: settings, pairs, captioner, dataset, learner.

    LoRA's B is not zero, which would hide errors in the gradient of A.
    """

    def make(model_id: str, train_dir, **changed) -> SimpleNamespace:
        flags = flags_of(
            {
                "MODEL_ID": model_id,
                "TRAIN_DIR": train_dir,
                "OUTPUT_DIR": tmp_path / "out",
                "LOAD_IN_4BIT": False,
                "LORA_RANK": 8,
                "LORA_ALPHA": 16.0,
                "LORA_DROPOUT": 0.0,
            }
            | changed
        )
        settings = finetune.parse_arguments(flags)
        finetune.check_settings(settings)
        pairs = finetune.find_pairs(settings.TRAIN_DIR, finetune.Findings())
        captioner = finetune.load_captioner(settings)

        folder = tmp_path / "features" / finetune.hash_vision_side(captioner)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = [pair.picture for pair in pairs]
        feature_files = finetune.encode_pictures(
            captioner, pictures, settings.TRAIN_DIR, folder, 1, finetune.Findings()
        )
        dataset = finetune.ImageCaptioningDataset(pairs, feature_files, captioner.row_builder)

        torch.manual_seed(3)
        adapter = finetune.add_lora(
            captioner.model,
            settings.LORA_TARGETS,
            settings.LORA_RANK,
            settings.LORA_ALPHA,
            settings.LORA_DROPOUT,
        )
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        learner = finetune.Learner(captioner, adapter, settings.WEIGHT_DECAY, settings.BATCH_SIZE)
        return SimpleNamespace(
            settings=settings,
            pairs=pairs,
            captioner=captioner,
            feature_files=feature_files,
            dataset=dataset,
            adapter=adapter,
            learner=learner,
        )

    return make
