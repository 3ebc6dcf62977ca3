"""Options of the training scripts: from the command line, from a file, and what is refused."""

import json

import pytest
import yaml

from maisi_diffusers.training.arguments import parse_args

OPTIONS = {
    "pretrained_model_name_or_path": "base",
    "data_list": "list.json",
    "output_dir": "output with a space",
    "max_train_steps": 12,
    "learning_rate": 1e-5,
    "weighted_loss_label": [129, 130],
    "use_lora": True,
    "use_ema": False,
    "mixed_precision": None,
}
LINE = [
    *("--pretrained_model_name_or_path", "base", "--data_list", "list.json", "--output_dir", "output with a space"),
    *("--max_train_steps", "12", "--learning_rate", "1e-5", "--weighted_loss_label", "129", "130", "--use_lora"),
]
REQUIRED = LINE[:6]


@pytest.fixture
def parser(train_controlnet):
    return train_controlnet.make_parser()


def write(folder, kind, options):
    path = folder / f"config.{kind}"
    path.write_text(json.dumps(options) if kind == "json" else yaml.safe_dump(options))
    return str(path)


def error_of(parser, line, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(parser, line)
    assert exit_.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_file_is_like_the_command_line(parser, tmp_path, kind):
    path = write(tmp_path, kind, OPTIONS)
    from_file, from_line = vars(parse_args(parser, ["--config", path])), vars(parse_args(parser, LINE))
    assert from_file.pop("config").name == f"config.{kind}" and from_line.pop("config") is None
    assert from_file == from_line
    assert from_file["learning_rate"] == 1e-5 and from_file["weighted_loss_label"] == [129, 130]
    assert from_file["use_lora"] and not from_file["use_ema"] and from_file["mixed_precision"] is None


def test_floats_as_yaml_reads_them(parser, tmp_path):
    """YAML takes 1e-5, without a point, for a text."""
    (tmp_path / "config.yaml").write_text("learning_rate: 1e-5\n")
    assert parse_args(parser, ["--config", str(tmp_path / "config.yaml"), *REQUIRED]).learning_rate == 1e-5


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_command_line_wins(parser, tmp_path, kind):
    path = write(tmp_path, kind, OPTIONS)
    args = parse_args(parser, ["--max_train_steps", "3", "--weighted_loss_label", "131", f"--config={path}"])
    assert (args.max_train_steps, args.weighted_loss_label, args.learning_rate) == (3, [131], 1e-5)
    assert str(args.output_dir) == "output with a space"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rat": 1e-5}, ["'learning_rat'", "does not exist"]),
        ({"config": "other.json"}, ["'config'", "does not exist"]),
        ({"max_train_steps": "many"}, ["--max_train_steps", "'many'"]),
        ({"max_train_steps": 0.5}, ["--max_train_steps", "'0.5'"]),
        ({"max_train_steps": True}, ["--max_train_steps", "expected one argument"]),
        ({"weighted_loss_label": ["liver"]}, ["--weighted_loss_label", "'liver'"]),
        ({"lr_scheduler": "linaer"}, ["--lr_scheduler", "'linaer'", "polynomial"]),
        ({"use_lora": "yes"}, ["yes"]),
        ({"train_batch_size": 0}, ["--train_batch_size", "0", "1 or more"]),
        ([1, 2], ["must hold names and values"]),
    ],
)
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_wrong_file(parser, tmp_path, capsys, kind, options, says):
    message = error_of(parser, ["--config", write(tmp_path, kind, options), *REQUIRED], capsys)
    assert all(part in message for part in says), message


@pytest.mark.parametrize(("name", "text"), [("config.json", "{"), ("config.yaml", "a: [")])
def test_file_that_cannot_be_read(parser, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    message = error_of(parser, ["--config", str(tmp_path / name), *REQUIRED], capsys)
    assert name in message and "cannot be read" in message


def test_no_such_file(parser, tmp_path, capsys):
    message = error_of(parser, ["--config", str(tmp_path / "missing.json"), *REQUIRED], capsys)
    assert "missing.json" in message and "does not exist" in message


@pytest.mark.parametrize(
    "name",
    [
        "train_batch_size",
        "num_train_epochs",
        "max_train_steps",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
        "learning_rate",
        "max_grad_norm",
    ],
)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_out_of_range(parser, capsys, name, value):
    message = error_of(parser, [*REQUIRED, f"--{name}", value], capsys)
    assert f"argument --{name}" in message and value in message and "is not allowed, give" in message


def test_learning_rate_of_nan(parser, capsys):
    assert "nan is not allowed" in error_of(parser, [*REQUIRED, "--learning_rate", "nan"], capsys)


def test_required(parser, capsys):
    message = error_of(parser, ["--output_dir", "output"], capsys)
    assert "--pretrained_model_name_or_path" in message and "--data_list" in message
