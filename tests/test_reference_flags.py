"""Coming from the reference: every flag of its scripts is answered, by the parsers, by one table, and by the
README's page."""
import json
import re

import pytest
from conftest import GOLDEN, ROOT

import evaluate_fid
import finetune_vae
import sample_ddp
import train_repae_e
from models.runtime import cli, prepare

KEYS = json.loads((GOLDEN / "keys_checkpoint.json").read_text())
PAGE = re.search(r"## Coming from the reference\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)[1]
SECTIONS = dict(zip(("training", "sampling", "latents"), re.split(r"\n\*\*\w", PAGE)[1:], strict=True))
SCRIPTS = {"training": train_repae_e, "sampling": sample_ddp, "latents": train_repae_e}


def answers(section):
    """The page's answer to each flag: those of its list, which are the same here, and its table's rows."""
    listed = re.search(r"\n\n(`--.*?): the same\n", section, re.S)[1]
    rows = re.findall(r"^\| `(--[a-z0-9-]+)` \| (.*) \|$", section, re.M)
    same = re.findall("--[a-z0-9-]+", listed)
    assert len({*same, *dict(rows)}) == len(same) + len(rows), "a flag is answered twice"
    return dict.fromkeys(same, "the same") | dict(rows)


def error_of(script, *argv, capsys):
    """The one line that a command line ends in, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        (prepare.main if script is prepare else script.parse_args)([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def flags_of(script, capsys):
    """The flags on the script's help page."""
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.M))


@pytest.mark.parametrize("name", SECTIONS)
def test_every_flag_on_the_page_is_answered(name, capsys):
    """By the script's own flag, or by the table in the page's words."""
    ours = flags_of(SCRIPTS[name], capsys)
    for flag, answer in answers(SECTIONS[name]).items():
        if answer.startswith("the same"):
            assert flag in ours
        else:
            assert answer == cli.REFERENCE_FLAGS[flag], flag


def test_the_table_is_on_the_page_and_names_flags_that_exist(capsys):
    on_page = {flag: answer for section in SECTIONS.values() for flag, answer in answers(section).items()}
    scripts = train_repae_e, finetune_vae, sample_ddp, evaluate_fid
    ours = set().union(*(flags_of(script, capsys) for script in scripts))
    for flag, answer in cli.REFERENCE_FLAGS.items():
        assert flag in on_page and set(re.findall("--[a-z0-9-]+", answer)) <= ours, flag


@pytest.mark.parametrize("kind", ["repae_args", "ldm_only_args"])
def test_the_page_has_every_flag_of_the_released_args(kind):
    """And says where a default differs that is not one of the run's own choices."""
    page, ours = answers(SECTIONS["training"]), vars(train_repae_e.parse_args([]))
    for name, value in KEYS[kind].items():
        flag = f"--{name.replace('_', '-')}"
        assert flag in page, flag
        if page[flag] == "the same" and name not in ("model", "vae"):
            assert ours[name] == value, flag
    sampling = answers(SECTIONS["sampling"])
    ours = vars(sample_ddp.parse_args([]))
    for flag, answer in sampling.items():
        if there := re.fullmatch(r"the same; (\S+) there, (\S+) here", answer):
            assert str(ours[flag[2:].replace("-", "_")]) == there[2], flag


@pytest.mark.parametrize("script", [train_repae_e, finetune_vae, sample_ddp, evaluate_fid, prepare],
                         ids=lambda s: s.__name__)
def test_a_command_of_the_reference_ends_in_one_line(script, capsys):
    needed = ["a", "b"] if script in (evaluate_fid, prepare) else []
    error = error_of(script, *needed, "--enc-type", "dinov2-vit-b", "--disc-pretrained-ckpt=a.pt",
                     "--no-fused-attn", "--loss-cfg-path", "l1.yaml", capsys=capsys)
    for flag, ours in (("--enc-type", "--encoder"), ("--disc-pretrained-ckpt", "--disc-ckpt"),
                       ("--fused-attn", "leave it out"), ("--loss-cfg-path", "--perceptual-weight")):
        assert f"{flag} is the reference's: " in error and ours in error
    error = error_of(script, *needed, "--no-such-flag", "3", capsys=capsys)
    assert "unrecognized arguments: --no-such-flag" in error and "reference" not in error
