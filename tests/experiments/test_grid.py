"""Composing a sweep: the same configs as Hydra's own, for a fraction of the compositions, and all errors together."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import DictConfig

from experiments.launch import grid
from experiments.launch.plugins import as_composed
from experiments.schema import ConfigError
from tests.experiments.conftest import ROOT

CUSTOM = """
defaults: [{shape: round}, _self_]
number: 1
text: ${number} of ${shape.sides}
list: [1, "${number}"]
inner: {a: {b: "${text}"}, c: null, d: 1.5}
alias: ${inner.a}
missing: ???
hydra:
  output_subdir: null
"""


@pytest.fixture
def loader() -> Iterator[ConfigLoader]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture
def custom(tmp_path: Path) -> Iterator[ConfigLoader]:
    """Other configs, with interpolations of many kinds."""
    (tmp_path / "shape").mkdir()
    (tmp_path / "config.yaml").write_text(CUSTOM)
    (tmp_path / "shape" / "round.yaml").write_text("sides: 0\n")
    (tmp_path / "shape" / "square.yaml").write_text("sides: ${number}\nside: {length: '${..sides}'}\n")
    (tmp_path / "shape" / "named.yaml").write_text("sides: 3\nname: ${oc.decode:'${number}'}\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def master() -> DictConfig:
    return compose("config", return_hydra_config=True)


def assert_as_hydra(loader: ConfigLoader, arguments: list[str]) -> None:
    whole = master()
    lists = grid.combinations(arguments, loader)
    found, problems = grid.compose(loader, whole, lists)
    assert problems == []
    assert len(found) == len(lists)
    for one, overrides in zip(found, lists, strict=True):
        config = loader.load_sweep_config(whole, list(overrides))
        expected = as_composed(config, config.hydra)
        assert repr(one.config) == repr(expected.config), overrides  # types, and the order of keys
        assert one.choices == expected.choices


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["seed=3"],
        ["format=mxfp4,nvfp4", "transform=h,r", "seed=range(0,3)"],
        ["seed=0,1", "calibration.seed=5,null,'6'"],
        ["seed=1,1.0,true,'1',one,null"],
        ["calibration.windows=1e1,.5,-3,inf", "sweep=a-b,'c d',\"e,f\""],
        ["quantize.exclude=[],['*.down_proj']", "seed=0,1"],
        ["quantize.exclude=[],['*.down_proj',k]", "+quantize.more={a:1},{a:{b:2}}"],
        ["+extra=1,2", "seed=0,1", "extra=3,4"],
        ["~progress", "seed=0,1"],
        ["~quantize.exclude", "seed=0,1"],
        ["+quantize.more=1", "quantize.more=2,3"],
        ["++quantize.more=1,2", "quantize.more=7"],
        ["model=local,llama3_2_1b_instruct", "model.path=a,b/c.d,'e=f'"],
        ["model=local", "model.path=x", "model.revision=null,main"],
        ["calibration={batch_size:8},{windows:3}", "calibration.batch_size=1,2", "seed=1,2"],
        ["results=/tmp/a,/tmp/b", "device=cpu,'cuda:0'", "seed=\\${calibration.windows}"],
        ["format.scale_rule=ocp,paper", "format=mxfp4"],
        ["+transform@other=h,r", "seed=1,2"],
        ["calibration.seed=${seed}", "seed=1,2"],
        ["calibration.seed=${evaluation.windows},4", "evaluation.windows=1,2"],
        ["format=glob(mx*)", "seed=range(0,1,0.25)"],
        ["sweep='${seed}',???x", "seed=4,5"],
    ],
)
def test_a_config_is_the_one_that_hydra_composes(arguments: list[str], loader: ConfigLoader) -> None:
    assert_as_hydra(loader, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["number=1,2", "missing=1"],
        ["number=1,2", "shape=round,square", "missing=x,null"],
        ["number=1,2", "shape.sides=4,five", "missing=1"],
        ["inner.a.b=x,y", "missing=1"],
        ["inner.c=x,1", "inner.d=null,2", "number=3,4", "missing=1"],
        ["alias=x,y", "missing=1", "number=5,6"],
        ["inner.a=1,2", "missing=1", "~alias"],
        ["list.0=3,4", "number=5,6", "missing=1"],
        ["list=5", "number=5,6", "missing=1"],
        ["shape=named", "number=1,2", "missing=1"],
        ["shape=round,named", "number=1,2", "missing=1"],
    ],
)
def test_interpolations_are_resolved_as_hydra_does(arguments: list[str], custom: ConfigLoader) -> None:
    assert_as_hydra(custom, arguments)


def test_hydra_composes_once_for_each_choice_of_groups(loader: ConfigLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load = type(loader).load_sweep_config

    def counted(self: ConfigLoader, whole: DictConfig, overrides: list[str]) -> DictConfig:
        calls.append(overrides)
        return load(self, whole, overrides)

    monkeypatch.setattr(type(loader), "load_sweep_config", counted)
    arguments = ["format=mxfp4,nvfp4", "transform=h,r,wush", "seed=range(0,50)", "calibration.windows=4,8"]
    found, _ = grid.compose(loader, master(), grid.combinations(arguments, loader))
    assert len(found) == 600
    assert len(calls) == 6


def test_configs_share_the_parts_that_are_the_same(loader: ConfigLoader) -> None:
    arguments = ["format=mxfp4,nvfp4", "transform=h,r", "seed=0,1"]
    found, _ = grid.compose(loader, master(), grid.combinations(arguments, loader))
    for part, different in (("model", 1), ("format", 2), ("calibration", 2), ("transform", 3)):
        assert len({id(one.config[part]) for one in found}) == different


# --- what is wrong


def problems(loader: ConfigLoader, *arguments: str) -> list[str]:
    return grid.problems(loader, master(), arguments).splitlines()


def test_every_unknown_option_is_listed_once(loader: ConfigLoader) -> None:
    found = problems(loader, "format=mxfp4,mxfp5,nvfp5", "transform=hh,wush", "algorithm=qptq", "seed=range(0,3)")
    names = [line.partition(":")[0] for line in found]
    assert sorted(names) == ["algorithm=qptq", "format=mxfp5", "format=nvfp5", "transform=hh"]


def test_a_key_that_the_chosen_option_lacks_is_not_corrected_to_its_group_or_another_key(loader: ConfigLoader) -> None:
    assert problems(loader, "transform=h", "transform.signs=1") == [
        "transform.signs: unknown key (transform has: nothing)"
    ]
    (text,) = problems(loader, "calibration.cut=crops")
    assert text.startswith("calibration.cut: unknown key (calibration has: batch_size,")


def test_unknown_options_keys_and_wrong_values_come_together(loader: ConfigLoader) -> None:
    found = problems(
        loader,
        *("format=mxfp4,mxfp5", "formt=mxfp4,nvfp4", "calibration.window=3", "seed=-1,0,x", "device=gpu,cpu"),
        *("evaluation.windows=interval(1,2)", "transform=[h", "quantize.exclude=[1]"),
    )
    text = "\n".join(found)
    for start in (
        "format=mxfp5: unknown option; format has: int4,",
        "formt: unknown key; did you mean format?",
        "calibration.window: unknown key; did you mean calibration.windows? (calibration has:",
        "seed=-1: input should be greater",
        "seed=x: input should be a valid integer",
        "device=gpu: should be",
        "evaluation.windows=interval(1,2): not a list of values",
        "Error parsing override 'transform=[h'",
        "quantize.exclude.0=1: read as the number 1, but it is a text; put what you mean in quotes",
    ):
        assert start in text, start
    assert len(set(found)) == len(found)


def test_keys_of_an_option_that_is_not_there_are_not_blamed(loader: ConfigLoader) -> None:
    (line,) = problems(loader, "model=locl", "model.path=x", "seed=0,1")
    assert line.startswith("model=locl: unknown option")


def test_a_value_that_is_needed_is_named_once(loader: ConfigLoader) -> None:
    (line,) = problems(loader, "calibration=text", "seed=0,1,2", "format=mxfp4,nvfp4")
    assert line == "calibration.path: a value is needed; set calibration.path=..."


def test_a_sweep_with_problems_is_not_planned(loader: ConfigLoader) -> None:
    with pytest.raises(ConfigError, match="format=mxfp5"):
        grid.planned(loader, master(), grid.combinations(["format=mxfp4,mxfp5"], loader), [])


@pytest.mark.parametrize(
    ("arguments", "key", "texts"),
    [
        (["model=llama3_2_1b_instruct", "model.revision=1234e56"], "model.revision", ["1234e56"]),
        (["model=llama3_2_1b_instruct", "model.revision=1.10,2e3"], "model.revision", ["1.10", "2e3"]),
        (["sweep=20260101"], "sweep", ["20260101"]),
        (["results=true"], "results", ["true"]),
    ],
)
def test_a_text_that_reads_as_a_number_is_told_as_it_was_typed(
    arguments: list[str], key: str, texts: list[str], loader: ConfigLoader
) -> None:
    found = grid.problems(loader, master(), arguments).splitlines()
    assert [line.partition(": ")[0] for line in found] == [f"{key}={text}" for text in texts]
    assert all(f"put it in quotes: {key}='\"{text}\"'" in line for text, line in zip(texts, found, strict=True))


def test_a_text_in_quotes_is_taken(loader: ConfigLoader) -> None:
    lists = grid.combinations(['sweep="20260101"', "transform=h,wush"], loader)
    assert grid.planned(loader, master(), lists, []).name == "20260101"


@pytest.mark.parametrize(
    "text",
    ["[1,2],[3]", "a,b", "1e5,1.10", "'x,y',z", '"a\\"b,c",d', "{a: [1,2]},{b: 1}", " a , b ", "x"],
)
def test_values_are_listed_as_hydra_lists_them(text: str, loader: ConfigLoader) -> None:
    lists = grid.combinations([f"key={text}"], loader)
    parser = OverridesParser.create()
    (whole,) = parser.parse_overrides([f"key={text}"])
    expected = list(whole.sweep_iterator()) if whole.is_sweep_override() else [whole.value()]
    expected = [one.text if isinstance(one, QuotedString) else one for one in expected]
    assert [parser.parse_overrides([one])[0].value() for (one,) in lists] == expected


def test_a_given_option_takes_the_place_of_a_grids_option_and_of_its_keys(loader: ConfigLoader) -> None:
    grids = [["transform=i,h"], ["transform=r", "transform.per_tile=true", "seed=0,1", "calibration.windows=8"]]
    found = [set(own) for own in grid.combinations(["transform=wush"], loader, grids)]
    rest = [{"transform=wush", f"seed={seed}", "calibration.windows=8"} for seed in (0, 1)]
    assert found == [{"transform=wush"}, *rest]
    kept = grid.combinations(["transform.per_tile=false"], loader, grids[1:])
    assert all("transform.per_tile=false" in own and "transform.per_tile=true" not in own for own in kept)
