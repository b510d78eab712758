"""The memory of a linearized layer while a model decodes, as a layer of transformers' cache.

Shape suffixes: B sequences, G KV heads, W remembered keys, D head dimension, E = D + 1 (values and a
column of ones), F features, T new tokens (1: one new token), S = W + T.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from slope_cli.linearize.exact_cache import no_entries
from slope_cli.linearize.linear_attention import Attended, Entries, Maps, Pattern, with_ones


class Remembered(NamedTuple):
    """What a LinearWindow reads of a sequence, the new tokens included.

    keys, values: (B, G, S, D). keep: (B, S), bool, which of them are real. state: (B, G, F, E), of the tokens before;
    with the delta rule, here and below, (B, G, F, D).
    first: (B,), the position of the first new token, counted from the first real one. entries: of the exact cache, if
    the layer has one.
    """

    keys: Tensor
    values: Tensor
    keep: Tensor
    state: Tensor
    first: Tensor
    entries: Entries | None


class Ring(NamedTuple):
    """The tensors of a LinearWindowCache that a decoded token changes, in place.

    keys, values: (B, G, W, D). keep: (B, W), bool. state: (B, G, F, E). oldest: (1,), the place of the oldest key.
    """

    keys: Tensor
    values: Tensor
    keep: Tensor
    state: Tensor
    oldest: Tensor


class LinearWindowCache(CacheLayerMixin):  # type: ignore[misc]
    """The last W keys and values of a sequence, and the float32 state of all before: of one size at any length.

    Beside the state there are the entries of the exact cache, if the pattern has one, and all keys and values of heads
    that have softmax attention, if there are any: these grow with the text.

    The W are a ring buffer: the next token replaces the oldest. Left padding is kept as tokens that are not real. Beams
    are reordered as in every cache; tokens cannot be removed (`crop`), because the state forgets which they were.
    """

    is_sliding = False

    def __init__(
        self, pattern: Pattern, features: int, softmax_heads: Sequence[int] = (), *, summed: bool = True
    ) -> None:
        """
        Args:
            softmax_heads: KV heads whose keys and values are all kept, as softmax_keys and softmax_values.
            summed: the state is a sum, with a column for its denominator, and not the delta rule's.
        """
        super().__init__()
        self.pattern, self.features, self.summed, self.seen = pattern, features, summed, 0
        self.softmax_heads = [*softmax_heads]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty memory, for keys and values like these (B, G, any, D)."""
        (B, G, _, D), W = key_states.shape, self.pattern.lookback
        self.dtype, self.device = key_states.dtype, key_states.device
        precise = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.keys, self.values = key_states.new_zeros(B, G, W, D), value_states.new_zeros(B, G, W, D)
        self.keep_BW = torch.zeros(B, W, dtype=torch.bool, device=self.device)
        self.state_BGFE = key_states.new_zeros(B, G, self.features, D + self.summed, dtype=precise)
        self.oldest_1 = torch.zeros(1, dtype=torch.long, device=self.device)
        self.tokens_B = torch.zeros(
            B, dtype=torch.long, device=self.device
        )  # where keys become far by blocks, since the first real one
        if self.pattern.cache:
            self._hold(no_entries(self.keys, self.values, self.pattern.cache))
        if self.softmax_heads:
            self.softmax_keys, self.softmax_values = (key_states.new_zeros(B, len(self.softmax_heads), 0, D),) * 2
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: `recall` joins the remembered ones to them.

        Those of softmax heads join the earlier ones at once.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.softmax_heads:
            heads = key_states.shape[1], self.softmax_heads
            self.softmax_keys = torch.cat([self.softmax_keys, of_kv_heads(key_states, *heads)], dim=2)
            self.softmax_values = torch.cat([self.softmax_values, of_kv_heads(value_states, *heads)], dim=2)
        return key_states, value_states

    def recall(self, k_BGTD: Tensor, v_BGTD: Tensor, keep_BT: Tensor | None) -> Remembered:
        """The remembered and the new keys, for attention to read; `remember` comes after it."""
        if keep_BT is None:
            keep_BT = torch.ones(k_BGTD.shape[0], k_BGTD.shape[2], dtype=torch.bool, device=k_BGTD.device)
        W = self.pattern.lookback
        order_W = (torch.arange(W, device=self.device) + self.oldest_1) % max(W, 1)
        return Remembered(
            torch.cat([self.keys[:, :, order_W], k_BGTD.to(self.dtype)], dim=2),
            torch.cat([self.values[:, :, order_W], v_BGTD.to(self.dtype)], dim=2),
            torch.cat([self.keep_BW[:, order_W], keep_BT], dim=1),
            self.state_BGFE,
            torch.where(self.tokens_B > 0, self.tokens_B, leading_padding(keep_BT).neg()),
            Entries(self.entry_keys, self.entry_values, self.entry_positions) if self.pattern.cache else None,
        )

    def remember(self, read: Remembered, attended: Attended) -> None:
        """Keep the newest W of the keys that were read, and what attention made of those before them."""
        assert attended.state is not None
        W = self.pattern.lookback
        new = read.keys.shape[2] - W
        # Copies: a view would keep the keys of a whole prompt alive.
        self.keys, self.values = read.keys[:, :, new:].clone(), read.values[:, :, new:].clone()
        self.keep_BW, self.state_BGFE = read.keep[:, new:].clone(), attended.state
        if attended.entries is not None:
            self._hold(attended.entries)
        self.oldest_1 = torch.zeros_like(self.oldest_1)
        self.tokens_B = (read.first + new).clamp(min=0)
        self.seen += new

    def ring(self) -> Ring:
        """What decoding changes in place: the tensors themselves."""
        assert self.keys is not None
        assert self.values is not None
        return Ring(self.keys, self.values, self.keep_BW, self.state_BGFE, self.oldest_1)

    def get_seq_length(self) -> int:
        """Tokens seen, padding among them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a full cache: the mask is the plain padding mask."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.pattern, self.features, self.softmax_heads, summed=self.summed)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each sequence the memory of the beam that it continues."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if self.is_initialized:
            indices = indices.to(self.device)
            self._each(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence this many times."""
        if self.is_initialized:
            self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """ValueError for anything but 0 tokens."""
        if tokens_to_remove:
            raise ValueError("a linearized layer cannot remove tokens: decode without an assistant model")

    def offload(self) -> None:
        """Does nothing: the memory is small, and always needed."""

    def prefetch(self) -> None:
        """Does nothing."""

    def nbytes(self) -> int:
        """Bytes of the memory."""
        if not self.is_initialized:
            return 0
        return self.oldest_1.nbytes + sum(tensor.nbytes for tensor in self.tensors().values())

    def first(self, rows: int) -> "LinearWindowCache":
        """The memory of the first sequences: what is changed in place is changed in this one, too."""
        view = LinearWindowCache(self.pattern, self.features, summed=self.summed)
        view.dtype, view.device, view.oldest_1, view.is_initialized = self.dtype, self.device, self.oldest_1, True
        for name, tensor in self.tensors().items():
            setattr(view, name, tensor[:rows])
        return view

    def put(self, rows_P: Tensor, other: "LinearWindowCache") -> None:
        """Let these sequences, int64, be those of `other`, in their order. In place, and fit for a CUDA graph."""
        W = self.pattern.lookback
        order_W = (torch.arange(W, device=self.device) - self.oldest_1 + other.oldest_1) % max(W, 1)
        places = {"keys": 2, "values": 2, "keep_BW": 1}
        new = other.tensors()
        for name, own in self.tensors().items():
            own.index_copy_(0, rows_P, new[name].index_select(places[name], order_W) if name in places else new[name])

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered of each sequence, by name; the first dimension is that of the sequences."""
        entries = ("entry_keys", "entry_values", "entry_positions") if self.pattern.cache else ()
        whole = ("softmax_keys", "softmax_values") if self.softmax_heads else ()
        names = ("keys", "values", "keep_BW", "state_BGFE", "tokens_B", *entries, *whole)
        return {name: getattr(self, name) for name in names}

    def _hold(self, entries: Entries) -> None:
        self.entry_keys, self.entry_values = entries.keys.to(self.dtype), entries.values.to(self.dtype)
        self.entry_positions = entries.positions

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, change(tensor))


def absorb_oldest(ring: Ring, maps: Maps) -> None:
    """In place: the oldest key and value join the state, by their gate and beta if they have; then `replace_oldest`.

    In both, no shape depends on the data and the host reads nothing of the device: a CUDA graph can hold them.
    """
    dtype = ring.state.dtype
    old_k_BG1D, old_v_BG1D = (remembered.index_select(2, ring.oldest) for remembered in (ring.keys, ring.values))
    old_keep_B11 = ring.keep.index_select(1, ring.oldest)[:, None]
    old_k_BG1D, old_v_BG1D = old_k_BG1D.to(dtype), old_v_BG1D.to(dtype)
    phi_BG1F = maps.k(old_k_BG1D)
    if maps.gate is not None:
        ring.state.mul_((maps.gate(old_k_BG1D) * old_keep_B11).exp()[..., None])
    if maps.beta is None:
        added_BG1E = with_ones(old_v_BG1D) * old_keep_B11[..., None]
    else:
        added_BG1E = (maps.beta(old_k_BG1D) * old_keep_B11)[..., None] * (old_v_BG1D - phi_BG1F @ ring.state)
    ring.state.addcmul_(phi_BG1F.mT, added_BG1E)


def replace_oldest(ring: Ring, k_BG1D: Tensor, v_BG1D: Tensor, keep_B1: Tensor) -> None:
    """In place, in a window and not a terrace: a new token takes the place of the oldest one."""
    ring.keys.index_copy_(2, ring.oldest, k_BG1D.to(ring.keys.dtype))
    ring.values.index_copy_(2, ring.oldest, v_BG1D.to(ring.values.dtype))
    ring.keep.index_copy_(1, ring.oldest, keep_B1)
    ring.oldest.add_(1).remainder_(ring.keys.shape[2])


def of_kv_heads(x_BHTI: Tensor, kv_heads: int, chosen: Sequence[int]) -> Tensor:
    """Of G KV heads, or the H query heads that share them, those of the chosen ones; no index has to reach a GPU."""
    parts = x_BHTI.chunk(kv_heads, dim=1)
    return torch.cat([parts[head] for head in chosen], dim=1)


def leading_padding(keep_BT: Tensor) -> Tensor:
    """How many of each sequence's tokens come before its first real one: (B,), int64."""
    return (keep_BT.cumsum(1) == 0).sum(1)
