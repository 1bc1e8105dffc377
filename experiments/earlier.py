"""What earlier versions of this program wrote, as this one has it: plain values in, plain values out."""

from typing import Any


def from_version_4(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a record of schema version 4; what is no such content is left for the validation to judge.

    Raises `ValueError` for what is no record.
    """

    def layer(own: dict[str, Any]) -> dict[str, Any]:
        loss = own.get("loss")
        return own if loss is None else own | {"loss": _renamed(loss, {"predicted": "even"})}

    def block(own: dict[str, Any]) -> dict[str, Any]:
        error = {"mse": own["mse"], "relative": own["relative_mse"]}
        kept = {key: value for key, value in own.items() if key not in ("mse", "relative_mse")}
        return kept | {"calibration": error, "layers": [layer(one) for one in own["layers"]]}

    try:
        blocks = [block(one) for one in values["blocks"]]
        return values | {"blocks": blocks, "choices": choices_of_today(values["choices"])}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no record of schema version 4: {error!r}") from error


def choices_of_today(choices: dict[str, str]) -> dict[str, str]:
    """The options of groups by their present names: the original model was `format=bf16`."""
    return choices | {"format": "original"} if choices.get("format") == "bf16" else choices


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}
