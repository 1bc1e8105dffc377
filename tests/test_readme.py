"""What the README shows works as shown."""

import re
from pathlib import Path

import pytest
import torch
import yaml

import wush
import wush.formats
import wush.transforms
from experiments.schema import validate
from plots.readme import rewritten
from plots.records import load
from tests.experiments.conftest import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def block(language: str, word: str) -> str:
    (found,) = [text for kind, text in BLOCKS if kind == language and word in text]
    return found


def test_the_added_format_is_a_format_in_under_30_lines(generator: torch.Generator) -> None:
    code = block("python", "class Int8(Format)")
    assert len(code.splitlines()) < 30
    scope = dict(vars(wush.formats))
    exec(code, scope)
    x = torch.randn(4, 64, generator=generator)
    fmt = scope["Int8"]()
    assert ((fmt.round_trip(x) - x).norm() / x.norm()) < 0.01
    assert torch.equal(fmt.dequantize(fmt.quantize(x)), fmt.round_trip(x))


def test_the_added_transform_is_a_transform_in_under_30_lines(generator: torch.Generator) -> None:
    code = block("python", "class Pca(Transform)")
    assert len(code.splitlines()) < 30
    scope = dict(vars(wush.transforms))
    exec(code, scope)
    moment = wush.SecondMoment(64)
    moment.add(torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    weight = torch.randn(16, 64, generator=generator)
    result = wush.Rtn().quantize_weight(weight, moment, scope["Pca"](), wush.MXFP4)
    rotated = result.transform.double() @ moment.diagonal_blocks(32) @ result.transform.double().mT
    torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-2)


def test_the_added_model_is_valid() -> None:
    node = yaml.safe_load(block("yaml", "mistralai"))
    validate(config() | {"model": node})


def test_the_library_example_uses_only_what_is_public() -> None:
    for name in re.findall(r"wush\.(\w+)", block("python", "load_pretrained(")):
        assert name in {*wush.__all__, "models", "texts"}, name


@pytest.mark.parametrize(
    "group", ["model", "format", "transform", "algorithm", "calibration", "evaluation", "tracking"]
)
def test_every_option_of_a_group_is_in_the_table(group: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{group}`"))
    for path in (ROOT / "conf" / group).glob("*.yaml"):
        assert f"`{path.stem}`" in row


def test_no_number_is_left_to_fill_in() -> None:
    blocks = re.sub(r"<!-- made by python -m plots readme: (\w+) -->(.*?)<!-- /\1 -->", r"\2", README, flags=re.DOTALL)
    assert not re.findall(r"<!--|\bORIGINAL\b|\bMACHINE\b|\bREFIT\b", blocks)


def test_the_numbers_are_those_of_the_committed_records() -> None:
    assert rewritten(README, load()) == README, "run python -m plots readme"
