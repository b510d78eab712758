"""`python -m slope_cli.evaluate.harness …`: lm-eval's own command line, which also knows the model type "slope".

lm-eval finds no model types of other packages by itself.
"""

from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from slope_cli.checkpoint.load import load_model
from slope_cli.distributed.launch import pick_device
from slope_cli.errors import UsageError
from slope_cli.evaluate.lm_tasks import wrapper_options
from sparse_kernels import set_backend


@register_model("slope")
class SlopeLM(HFLM):  # type: ignore[misc] # lm-eval has no types
    """A run, sparse or linearized, or any folder that slope loads: --model slope --model_args pretrained=RUN."""

    def __init__(self, pretrained: str, device: str | None = None, **options: Any) -> None:
        """
        Args:
            pretrained: the folder of the model.
            device: "cpu" or "cuda"; None for the GPU if there is one.
            options: those of lm-eval's HFLM that fit a model that is loaded already.

        Raises:
            UsageError, SlopeError: as `load_model`; or a model that predicts masked tokens.
        """
        loaded = load_model(Path(pretrained), pick_device(device or "auto"))
        if loaded.objective != "causal":
            raise UsageError(f"{pretrained}: predicts masked tokens, not the next one")
        set_backend(loaded.model, "dense")  # as `slope eval`
        super().__init__(loaded.model, **wrapper_options(loaded.model, loaded.tokenizer) | options)


if __name__ == "__main__":
    cli_evaluate()
