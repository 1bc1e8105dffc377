"""What a quantized model refuses: `save_pretrained`, which would write a checkpoint that loads with random linears."""

from typing import Any, NoReturn

from torch import nn

from wush.errors import UnsupportedModelError


def refuse_saving(model: nn.Module) -> None:
    """From now on a model and its parts refuse `save_pretrained` and `push_to_hub`; copies and pickles do so too."""
    for module in model.modules():
        for name in ("save_pretrained", "push_to_hub"):  # the latter makes a repository before it saves
            if hasattr(type(module), name):
                # Not bound to the module: a cycle would keep its memory, and a pickled method is the class's again.
                setattr(module, name, _refuse)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise UnsupportedModelError(
        "the model was quantized by wush, in whole or in part, and nothing could load what it would write; "
        "keep it with torch.save(model, path), or load the original again"
    )
