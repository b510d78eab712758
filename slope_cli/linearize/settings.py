"""What a linearized model is, apart from its weights."""

import difflib
from dataclasses import dataclass
from typing import Literal

from slope_cli.errors import UsageError

Branch = Literal["both", "window", "linear"]
BRANCHES: tuple[Branch, ...] = ("both", "window", "linear")
MAPS = ("hedgehog", "t2r")


@dataclass(frozen=True)
class LinearizeSettings:
    """The form of the linearized attention layers; the same settings make the same modules.

    feature_map: "hedgehog", phi(x) = [softmax(xW), softmax(-xW)], or "t2r", phi(x) = relu(xW + b).
    features: columns of W for each head; None for as many features in all as the head has dimensions, in a hedgehog at
        least 32.
    window: tokens near enough for softmax, the token itself among them.
    terrace: a token's softmax covers its own block of `window` tokens up to itself and the whole block before, instead
        of the last `window` tokens.
    mix: weight of the window branch against the linear one at the start, strictly between 0 and 1.
    window_dropout: how often training drops the window of a head, so that the linear branch must carry it alone.
    keep_softmax: indices of layers left as they are.
    seed: of the entries of W that do not start as the identity.
    """

    feature_map: str = "hedgehog"
    features: int | None = None
    window: int = 64
    terrace: bool = False
    mix: float = 0.1
    window_dropout: float = 0.0
    keep_softmax: tuple[int, ...] = ()
    seed: int = 0

    def check(self, layers: int, *, causal: bool) -> None:
        """UsageError, one line, if a value is out of range or does not fit a model of `layers` attention layers."""
        if self.feature_map not in MAPS:
            close = difflib.get_close_matches(self.feature_map.lower(), MAPS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(MAPS)}"
            raise UsageError(f"feature_map: unknown {self.feature_map!r}; {hint}")
        if self.features is not None and self.features < 1:
            raise UsageError(f"features must be at least 1, not {self.features}")
        if self.window < 1:
            raise UsageError(f"window must be at least 1, not {self.window}")
        if not 0 < self.mix < 1:
            raise UsageError(f"mix must be between 0 and 1, neither of them included, not {self.mix}")
        if not 0 <= self.window_dropout <= 1:
            raise UsageError(f"window_dropout must be from 0 to 1, not {self.window_dropout}")
        if unknown := [index for index in self.keep_softmax if not 0 <= index < layers]:
            raise UsageError(f"keep_softmax: there is no layer {unknown[0]}; the model's are 0 to {layers - 1}")
        if len(set(self.keep_softmax)) == layers:
            raise UsageError(f"keep_softmax: names all {layers} layers, so that none would be linearized")
        if self.terrace and not causal:
            raise UsageError("terrace: has no meaning in a two-sided model; leave it out")
