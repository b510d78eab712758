"""The module that each linearized attention layer gets: feature maps, mix factors, and how they are used.

Shape suffixes: B sequences, H query heads, G KV heads, T queries, D head dimension.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from slope_cli.config.methods import LinearizeConfig
from slope_cli.linearize.cache import LinearWindowCache, leading_padding, of_kv_heads
from slope_cli.linearize.decode import decode
from slope_cli.linearize.delta import FIRST_BETA, FIRST_SHARE, Share, attend_delta
from slope_cli.linearize.exact_cache import attend_cached
from slope_cli.linearize.gate import Gate
from slope_cli.linearize.linear_attention import Attended, Branch, Entries, Maps, Pattern, attend
from slope_cli.linearize.maps import make_map

Mode = Literal["linear", "softmax", "transfer"]
Observer = Callable[["LinearWindow", Tensor, Tensor, Tensor, float, Tensor | None, Tensor], None]
"""Called in transfer with the module, q, k, v, scale, keep, and softmax attention's y (B, H, T, D)."""


class LinearWindow(nn.Module):
    """Everything that linearizing adds to one attention layer; its name there is `linear`.

    Trainable: the feature map of queries (one W for each query head), that of keys (one for each KV head), and `mix`,
    (H,), whose sigmoid is gamma; with a gated state also the gate of keys (one for each KV head); with the delta rule
    gate and `beta` of keys, and in the place of `mix` the `share` of queries (one for each query head).

    mode: what the layer computes: "linear", the linearized attention; "softmax", the original one; "transfer", the
    original one, after the observer has compared the two.
    branch: see `attend`. window_dropout: probability that training drops the window of one head of one sequence.
    softmax_heads: the KV heads that have softmax attention instead, with the query heads that share them; whoever calls
    attention computes that, and without a memory calls this with the parameters of the others (`parameters_of`). With a
    memory what `forward` returns for them does not count.
    compiled: whether torch.compile makes the kernels of single tokens, and of the loss in transfer; worth it on a GPU,
    for many tokens or steps.
    """

    def __init__(
        self,
        config: LinearizeConfig,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        generator: Generator,
    ) -> None:
        super().__init__()
        delta = config.state == "delta"
        name, columns = ("unit", None) if delta else (config.feature_map, config.features)
        self.map_q = make_map(name, heads, head_dim, columns, generator)
        self.map_k = make_map(name, kv_heads, head_dim, columns, generator)
        self.gate = Gate(kv_heads, head_dim) if config.gated else None
        self.beta = Share(kv_heads, head_dim, FIRST_BETA) if delta else None
        self.share = Share(heads, head_dim, FIRST_SHARE) if delta else None
        self.mix = None if delta else nn.Parameter(torch.full((heads,), math.log(config.mix / (1 - config.mix))))
        self.pattern = Pattern(config.window, config.kind == "terrace", causal, config.cache)
        self.window_dropout = config.window_dropout
        self.mode: Mode = "linear"
        self.branch: Branch = "both"
        self.softmax_heads: tuple[int, ...] = ()
        self.compiled = False
        self.memory: LinearWindowCache | None = None
        self.observer: Observer | None = None
        self.hook: RemovableHandle | None = None
        self.softmax_config: Any = None
        self.softmax_name = ""

    def extra_repr(self) -> str:
        """For print(model)."""
        form = "terrace" if self.pattern.terrace else "window"
        cache = f", cache={self.pattern.cache}" if self.pattern.cache else ""
        cache += ", delta rule" if self.beta is not None else ", gated" if self.gate is not None else ""
        cache += f", softmax heads {self.softmax_heads}" if self.softmax_heads else ""
        return f"{form}={self.pattern.window}{cache}, mode={self.mode}, branch={self.branch}"

    @property
    def maps(self) -> Maps:
        """The feature maps, and what there is beside them, as functions."""
        return Maps(self.map_q, self.map_k, self.gate, self.beta, self.share)

    @property
    def gamma(self) -> Tensor | None:
        """The mix factor of each head, (H,); None with the delta rule."""
        return None if self.mix is None else self.mix.sigmoid()

    def new_cache(self) -> LinearWindowCache:
        """An empty memory of this layer."""
        return LinearWindowCache(self.pattern, self.map_k.features, self.softmax_heads, summed=self.beta is None)

    @property
    def kv_heads(self) -> int:
        """G."""
        return len(self.map_k.weight)

    @property
    def linear_heads(self) -> list[int]:
        """The KV heads that are linearized."""
        return [head for head in range(self.kv_heads) if head not in self.softmax_heads]

    def query_heads(self, kv_heads: Sequence[int]) -> list[int]:
        """The query heads that share these KV heads, in the order of these."""
        shared = len(self.map_q.weight) // self.kv_heads
        return [head * shared + place for head in kv_heads for place in range(shared)]

    def parameters_of(self, kv_heads: Sequence[int]) -> dict[str, Tensor]:
        """By their names the parameters of these KV heads, and of the query heads that share them, with gradients."""
        parameters = self.named_parameters()
        return {name: of_kv_heads(each[None], self.kv_heads, kv_heads)[0] for name, each in parameters}

    def of_heads(self, kv_heads: Sequence[int]) -> "LinearWindow":
        """A copy that has these KV heads alone, all of them linearized."""
        own = copy.deepcopy(self, {id(self.hook): None})  # which is the model's
        own.softmax_heads = ()
        for name, part in self.parameters_of(kv_heads).items():
            where, _, last = name.rpartition(".")
            required = self.get_parameter(name).requires_grad
            setattr(own.get_submodule(where), last, nn.Parameter(part.detach(), requires_grad=required))
        return own

    def forward(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        scale: float,
        keep_BT: Tensor | None = None,
        memory: LinearWindowCache | None = None,
    ) -> Tensor:
        """Linearized attention, (B, H, T, D) in the precision of q; `memory` is read and brought up to date.

        Args:
            keep_BT: bool, False for padding among these T tokens.
        """
        if memory is None:
            return self.compute(q_BHTD, k_BGTD, v_BGTD, scale, keep_BT).to(q_BHTD.dtype)
        if (
            q_BHTD.shape[2] == 1
            and self.pattern.lookback
            and not self.pattern.blockwise
            and not torch.is_grad_enabled()
        ):
            own = (self.gamma, self.maps, scale, memory, self.branch)
            y_BH1D = decode(q_BHTD, k_BGTD, v_BGTD, keep_BT, *own, compiled=self.compiled)
            return y_BH1D.to(q_BHTD.dtype)
        read = memory.recall(k_BGTD, v_BGTD, keep_BT)
        carried: dict[str, Any] = {"state": read.state, "entries": read.entries, "first_B": read.first}
        attended = self._attend(q_BHTD, read.keys, read.values, scale, read.keep, **carried)
        memory.remember(read, attended)
        return attended.y.to(q_BHTD.dtype)

    def compute(self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float, keep_BT: Tensor | None) -> Tensor:
        """Linearized attention without a memory, (B, H, T, D) in float32 (float64 if q is)."""
        dropped_BH = None
        if self.window_dropout and (self.training or self.mode == "transfer"):
            dropped_BH = torch.rand(q_BHTD.shape[:2], device=q_BHTD.device) < self.window_dropout
        first_B = None if keep_BT is None else leading_padding(keep_BT).neg()
        return self._attend(q_BHTD, k_BGTD, v_BGTD, scale, keep_BT, first_B=first_B, dropped_BH=dropped_BH).y

    def _attend(
        self,
        q_BHTD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        scale: float,
        keep_BS: Tensor | None,
        *,
        first_B: Tensor | None,
        state: Tensor | None = None,
        entries: Entries | None = None,
        dropped_BH: Tensor | None = None,
    ) -> Attended:
        given, maps, pattern = (q_BHTD, k_BGSD, v_BGSD, keep_BS), self.maps, self.pattern
        how: dict[str, Any] = {"branch": self.branch, "dropped_BH": dropped_BH}
        if self.mix is None:
            return attend_delta(*given, maps, pattern, scale, state_BGFD=state, **how)
        how |= {"state_BGFE": state, "first_B": first_B}
        if pattern.cache:
            return attend_cached(*given, self.mix.sigmoid(), maps, pattern, scale, entries=entries, **how)
        return attend(*given, self.mix.sigmoid(), maps, pattern, scale, **how)
