"""Window softmax and linear attention under one denominator: the mathematics, in chunks, in time linear in length.

For query n, near keys N(n) and far keys R(n), with s_nj = scale·q_n·k_j, c_n = max of s_nj over N(n), gamma the mix:

    weight of a near key   gamma · exp(s_nj - c_n)
    weight of a far key    phi_q(q_n·scale·sqrt(D)) · phi_k(k_j)
    y_n = (sum of weight · v_j) / (sum of weight)             over both sets: the weights of a query sum to 1

c_n is part of the model, not only a guard against overflow: only the near weights carry it. If all of a query's keys
are near, gamma cancels and y_n is softmax attention's.

Queries are taken in chunks of C. A chunk sees a band of K keys, its own and the R before it (in a two-sided layer also
the R after it): that holds all near keys and a few far ones. The far keys outside of the band come as a sum over them,
the state, phi_k(k)^T·[v, 1]; its last column, from the ones, adds up to the denominator. A decoder therefore keeps the
last R keys and values and the state of those before: the same function serves training, a prompt in any pieces, and
single tokens, which are chunks of one. Where the state is gated (see `gate`), the weight of far key j is multiplied by
the gates of the far keys after it.

Shape suffixes: B sequences, H query heads, G KV heads, P query heads for each KV head (H = G·P), T queries, S keys
(the remembered ones, then those of the queries), D head dimension, E = D + 1 (values and a column of ones),
F features, N chunks, C queries in a chunk, K keys in its band, of which the first J hold all that may be far.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slope_cli.linearize.gate import decays

Branch = Literal["both", "window", "linear"]
BRANCHES: tuple[Branch, ...] = ("both", "window", "linear")
"""The part of attention that is active."""
SHORTEST_CHUNK = 64
"""Shorter chunks cost more in states than they save in scores."""


@dataclass(frozen=True)
class Pattern:
    """Which keys are near a query: of a window of tokens, or of its own block and the one before (terrace).

    cache: entries of the exact cache of a KV head. Beside one, keys leave a window by blocks of as many tokens, as they
    do in a terrace.
    """

    window: int
    terrace: bool = False
    causal: bool = True
    cache: int = 0

    @property
    def blockwise(self) -> bool:
        """Whether keys become far by blocks of `window` tokens."""
        return self.terrace or self.cache > 0

    @property
    def lookback(self) -> int:
        """The largest distance of a near key before the query, the entries of a cache left out."""
        return self.always_near + self.blockwise * (self.window - 1)

    @property
    def always_near(self) -> int:
        """The largest distance at which every key is near, wherever the blocks begin."""
        return self.window if self.terrace else self.window - 1

    def masks(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(near, far): bool, shaped as positions of `queries` (..., C, 1) and `keys` (..., 1, K) broadcast.

        Positions count from a sequence's first real token. Entries of a cache are among the far ones.
        """
        distance = queries - keys
        if self.blockwise:
            # Not by the blocks of keys: Inductor makes floored quotients of negative numbers of them, and every eighth
            # came out wrong (torch 2.11, H100).
            near = keys >= queries - queries.remainder(self.window) - self.always_near
        else:
            near = distance.abs() < self.window
        allowed = distance >= 0 if self.causal else torch.ones_like(near)
        return near & allowed, allowed & ~near


class Maps(NamedTuple):
    """The feature maps of queries, (B, H, T, D) -> (B, H, T, F), and of keys, (B, G, S, D) -> (B, G, S, F).

    gate: of a gated state, and of the delta rule's, the logarithms of the gates of keys, (B, G, S, D) -> (B, G, S).
    beta, share: of the delta rule (see `delta`), of keys as the gate, and of queries, (B, H, T, D) -> (B, H, T).
    """

    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor] | None = None
    beta: Callable[[Tensor], Tensor] | None = None
    share: Callable[[Tensor], Tensor] | None = None


class Entries(NamedTuple):
    """The exact cache: far keys and values (B, G, X, D) that are not in the state.

    positions: (B, G, X), int64, counted from the first real token; -1 where there is no entry yet.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


class Attended(NamedTuple):
    """Output y (B, H, T, D), the new state (B, G, F, E) and the new entries, each None where none was given."""

    y: Tensor
    state: Tensor | None
    entries: Entries | None = None


class _Layout(NamedTuple):
    """How T queries and S keys are cut: C, N, R, zeros to put before and after the keys, K, and J.

    Band n is places n·C to n·C + K of the keys with these zeros, which are in whole chunks if N > 1. Its far keys are
    among the first J, 0 if it has none. In a causal layer K and J are multiples of 8, for a GPU's sake: what that adds
    to a band comes after the queries.
    """

    chunk: int
    chunks: int
    reach: int
    left: int
    right: int
    band: int
    far: int


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    keep_BS: Tensor | None,
    mix_H: Tensor,
    maps: Maps,
    pattern: Pattern,
    scale: float,
    *,
    state_BGFE: Tensor | None = None,
    first_B: Tensor | None = None,
    branch: Branch = "both",
    dropped_BH: Tensor | None = None,
) -> Attended:
    """Window softmax plus linear attention of T queries over the last T keys, those remembered before, and a state.

    Args:
        q_BHTD, k_BGSD, v_BGSD: S = T, or T + pattern.lookback where keys are remembered. Computed in float64 if they
            are, else in float32, under autocast too.
        keep_BS: bool, False for padding; None if there is none.
        mix_H: gamma of each head.
        state_BGFE: the sum over the keys before those given. With it the state of these and of the T oldest of the
            given keys is returned.
        first_B: position of the first query, counted from the first real token; only the terrace looks at it.
        branch: which weights count. "linear": the far ones, except for queries that have no far key.
        dropped_BH: bool, whose near weights do not count, again except for queries that have no far key.

    Returns:
        y, float32 or float64, 0 for a query without any key; and the new state.
    """
    with torch.autocast(q_BHTD.device.type, enabled=False):
        dtype = torch.float64 if q_BHTD.dtype == torch.float64 else torch.float32
        q_BHTD, k_BGSD, v_BGSD = q_BHTD.to(dtype), k_BGSD.to(dtype), v_BGSD.to(dtype)
        T, D, S = q_BHTD.shape[2], q_BHTD.shape[3], k_BGSD.shape[2]
        cut = _layout(T, S, pattern)
        k_BGSD, v_BGSE, keep_BS = _padded(k_BGSD, v_BGSD, keep_BS, cut)
        near, far = _masks(cut, pattern, first_B, q_BHTD.device)

        q_BGNPCD = _chunked(q_BHTD, k_BGSD.shape[1], cut)
        near_BGNPCK = _near_weights(q_BGNPCD, k_BGSD, keep_BS, near, scale, cut)
        near_BGNPCK = near_BGNPCK * mix_H.to(dtype).view(k_BGSD.shape[1], 1, -1, 1, 1)
        scaled_BHTD = q_BHTD * (scale * D**0.5)
        far_BGNPCJ, far_BGNPCE, new_state_BGFE = _far(
            scaled_BHTD, k_BGSD, v_BGSE, state_BGFE, maps, far[..., : cut.far], cut, pattern
        )
        v_BGN1KE = _bands(v_BGSE, cut, cut.band)[:, :, :, None]
        if far_BGNPCJ is not None and branch == "both" and dropped_BH is None:  # no need to keep them apart
            near_BGNPCK, far_BGNPCJ = near_BGNPCK + F.pad(far_BGNPCJ, (0, cut.band - cut.far)), None
        if far_BGNPCJ is not None:
            banded_BGNPCE = far_BGNPCJ @ v_BGN1KE[..., : cut.far, :]
            far_BGNPCE = banded_BGNPCE if far_BGNPCE is None else far_BGNPCE + banded_BGNPCE
        dropped_BGNPCE = None if dropped_BH is None else dropped_BH.view(len(q_BHTD), k_BGSD.shape[1], 1, -1, 1, 1)
        y_BGNPCD = normalised(near_BGNPCK @ v_BGN1KE, far_BGNPCE, branch, dropped_BGNPCE)
        return Attended(_joined(y_BGNPCD, T), new_state_BGFE)


def window_softmax(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, keep_BS: Tensor | None, pattern: Pattern, scale: float
) -> Tensor:
    """Softmax attention to the near keys alone, y (B, H, T, D), in the precision of q; no terrace. Others as above."""
    T, S = q_BHTD.shape[2], k_BGSD.shape[2]
    cut = _layout(T, S, pattern)
    k_BGSD, v_BGSE, keep_BS = _padded(k_BGSD, v_BGSD, keep_BS, cut)
    near, _ = _masks(cut, pattern, None, q_BHTD.device)
    near_BGNPCK = _near_weights(_chunked(q_BHTD, k_BGSD.shape[1], cut), k_BGSD, keep_BS, near, scale, cut)
    return _joined(normalised(near_BGNPCK @ _bands(v_BGSE, cut, cut.band)[:, :, :, None], None, "window"), T)


def with_ones(v_BGSD: Tensor) -> Tensor:
    """Values and the column of ones that adds up to the denominator: (B, G, S, E)."""
    # Not F.pad: torch 2.11's Inductor reads the index of a gathered v with the padding's 1.0, which is no integer.
    return torch.cat([v_BGSD, torch.ones_like(v_BGSD[..., :1])], dim=-1)


def weights_of(
    q_BHCD: Tensor,
    phi_q_BHCF: Tensor,
    k_BGSD: Tensor,
    phi_k_BGSF: Tensor,
    keep_BS: Tensor,
    mix_H: Tensor,
    pattern: Pattern,
    scale: float,
    *,
    start: int,
    first_B: Tensor,
    entries_BGCX: Tensor | None = None,
    log_gates_BGS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights (B, H, C, S) of queries start..start + C over all S keys: (softmax attention's, `attend`'s).

    Rows sum to 1, and to 0 for a query without any key. Float tensors of one precision. first_B: position of place 0.
    entries_BGCX: positions of the entries in the exact cache of each query, -1 for none; None without a cache.
    log_gates_BGS: of the keys, where the state is gated.
    """
    (B, _, C, _), (G, S) = q_BHCD.shape, k_BGSD.shape[1:3]
    places_S = torch.arange(S, device=q_BHCD.device)
    positions = first_B[:, None, None, None] + places_S
    near, far = pattern.masks(positions[..., start : start + C].mT, positions)
    near, far = (mask & keep_BS[:, None, None] for mask in (near, far))
    if entries_BGCX is not None:
        places_BGCX = (entries_BGCX - first_B[:, None, None, None]).masked_fill(entries_BGCX < 0, S)
        held_BGCS = near.new_zeros(B, G, C, S + 1).scatter_(3, places_BGCX, True)[..., :S]
        held_BHCS = held_BGCS.repeat_interleave(q_BHCD.shape[1] // G, dim=1)
        near, far = near | held_BHCS, far & ~held_BHCS
    scores_BHCS = scale * (q_BHCD.view(B, G, -1, C, q_BHCD.shape[-1]) @ k_BGSD.mT[:, :, None]).flatten(1, 2)
    softmax_BHCS = exp_below_max(scores_BHCS, near | far)
    far_BHCS = (phi_q_BHCF.view(B, G, -1, C, phi_q_BHCF.shape[-1]) @ phi_k_BGSF.mT[:, :, None]).flatten(1, 2) * far
    if log_gates_BGS is not None:
        decays_BGCS = decays(log_gates_BGS[:, :, None], far)[..., 1:]
        far_BHCS = far_BHCS * decays_BGCS.repeat_interleave(q_BHCD.shape[1] // G, dim=1)
    mixed_BHCS = mix_H[:, None, None].to(scores_BHCS.dtype) * exp_below_max(scores_BHCS, near) + far_BHCS
    return _shares(softmax_BHCS), _shares(mixed_BHCS)


def _layout(queries: int, keys: int, pattern: Pattern) -> _Layout:
    reach = min(pattern.lookback, keys - 1)
    chunk = min(queries, max(pattern.window, SHORTEST_CHUNK))
    chunks = -(-queries // chunk)
    band = -(-(chunk + reach) // 8) * 8 if pattern.causal else chunk + 2 * reach
    places = band if chunks == 1 else chunk * (chunks - 1 + -(-band // chunk))
    left = reach - (keys - queries)
    far = 0
    if min(chunk + reach, keys) - 1 > pattern.always_near:
        far = -(-(chunk + reach - 1 - pattern.always_near) // 8) * 8 if pattern.causal else band
    return _Layout(chunk, chunks, reach, left, places - left - keys, band, far)


def _masks(cut: _Layout, pattern: Pattern, first_B: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(near, far), each (C, K), or in a terrace (B or 1, 1, N, 1, C, K)."""
    queries = torch.arange(cut.chunk, device=device)[:, None]
    keys = torch.arange(cut.band, device=device)[None] - cut.reach
    if pattern.terrace:
        begins = torch.arange(cut.chunks, device=device)[:, None, None, None] * cut.chunk
        begins = begins if first_B is None else begins + first_B[:, None, None, None, None, None]
        queries, keys = begins + queries, begins + keys
    return pattern.masks(queries, keys)


def _padded(k_BGSD: Tensor, v_BGSD: Tensor, keep_BS: Tensor | None, cut: _Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values with a column of ones, which are 0 for padding, and keep, all with zeros before and after them."""
    keep_BS = k_BGSD.new_ones(len(k_BGSD), k_BGSD.shape[2], dtype=torch.bool) if keep_BS is None else keep_BS
    keep_BS = F.pad(keep_BS, (cut.left, cut.right))
    around = (0, 0, cut.left, cut.right)
    return F.pad(k_BGSD, around), F.pad(with_ones(v_BGSD), around) * keep_BS[:, None, :, None], keep_BS


def _chunked(x_BHTD: Tensor, groups: int, cut: _Layout) -> Tensor:
    """(B, H, T, D) -> (B, G, N, P, C, D), zeros where the last chunk is not full."""
    B, _, T, D = x_BHTD.shape
    x_BHTD = F.pad(x_BHTD, (0, 0, 0, cut.chunks * cut.chunk - T))
    return x_BHTD.reshape(B, groups, -1, cut.chunks, cut.chunk, D).transpose(2, 3)


def _joined(x_BGNPCD: Tensor, queries: int) -> Tensor:
    """The inverse of `_chunked`: (B, H, T, D)."""
    return x_BGNPCD.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :queries]


def _bands(x_BGSD: Tensor, cut: _Layout, width: int) -> Tensor:
    """(B, G, S, D) -> (B, G, N, width, D), the first places of each band.

    Of chunks side by side: gradients come back by slices, not one by one.
    """
    if cut.chunks == 1:
        return x_BGSD[:, :, None, :width]
    pieces_BGNCD = x_BGSD.unflatten(2, (-1, cut.chunk))
    starts = range(0, width, cut.chunk)
    parts = [pieces_BGNCD[:, :, n : n + cut.chunks, : width - start] for n, start in enumerate(starts)]
    return torch.cat(parts, dim=3)


def _near_weights(
    q_BGNPCD: Tensor, k_BGSD: Tensor, keep_BS: Tensor, near: Tensor, scale: float, cut: _Layout
) -> Tensor:
    """exp(s - c) of the near keys of each band, 0 for the others: (B, G, N, P, C, K)."""
    scores_BGNPCK = scale * (q_BGNPCD @ _bands(k_BGSD, cut, cut.band).mT[:, :, :, None])
    keep_BGNPCK = _bands(keep_BS[:, None, :, None], cut, cut.band).mT[:, :, :, None]
    return exp_below_max(scores_BGNPCK, near & keep_BGNPCK)


def exp_below_max(scores: Tensor, mask: Tensor) -> Tensor:
    """exp(scores - their maximum over the mask's True along the last dimension), 0 where the mask is False."""
    scores = scores.masked_fill(~mask, -torch.inf)
    # Not amax: Inductor's kernel for its gradient (torch 2.11 to 2.13, on a GPU) stores a row, sums it, and loads it
    # again in other threads than stored it, with no barrier between. That of max is scattered by a kernel of its own.
    highest = scores.max(-1, keepdim=True).values
    below: Tensor = scores - highest.masked_fill(highest == -torch.inf, 0.0)
    return below.exp()


def _far(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    state_BGFE: Tensor | None,
    maps: Maps,
    far: Tensor,
    cut: _Layout,
    pattern: Pattern,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Far keys: weights of those in the bands (B, G, N, P, C, J), sums over the rest (B, G, N, P, C, E), the new state.

    Each is None where there is none, the new state where there was none before. q is scaled as its map wants it.
    far: the mask of the first J places of the bands.
    """
    T, stateful = q_BHTD.shape[2], state_BGFE is not None or cut.chunks > 1
    weights_BGNPCJ, sums_BGNPCE, new_state_BGFE, log_gates_BGS, decays_BGN1CJ = None, None, None, None, None
    if cut.far or stateful:
        places = cut.chunk * (cut.chunks - 1 + -(-max(cut.far, 1) // cut.chunk))
        phi_k_BGSF = maps.k(k_BGSD[:, :, :places])
        phi_q_BGNPCF = _chunked(maps.q(q_BHTD), k_BGSD.shape[1], cut)
        if maps.gate is not None:
            log_gates_BGS = maps.gate(k_BGSD[:, :, :places]) * v_BGSE[:, :, :places, -1]  # there padding has a 0
    if cut.far:
        weights_BGNPCJ = (phi_q_BGNPCF @ _bands(phi_k_BGSF, cut, cut.far).mT[:, :, :, None]) * far
        if log_gates_BGS is not None:
            decays_BGN1CJ = decays(_bands(log_gates_BGS[..., None], cut, cut.far).mT[:, :, :, None], far)
            weights_BGNPCJ = weights_BGNPCJ * decays_BGN1CJ[..., 1:]
    if stateful:
        states_BGNFE, new_state_BGFE = _states(phi_k_BGSF, v_BGSE, log_gates_BGS, state_BGFE, T, cut)
        if not pattern.causal:
            used = slice(cut.chunks * cut.chunk + 2 * cut.reach)
            after_BGNFE, _ = _states(phi_k_BGSF[:, :, used].flip(2), v_BGSE[:, :, used].flip(2), None, None, T, cut)
            states_BGNFE = states_BGNFE + after_BGNFE.flip(2)
        sums_BGNPCE = phi_q_BGNPCF @ states_BGNFE[:, :, :, None]
        if decays_BGN1CJ is not None:
            sums_BGNPCE = sums_BGNPCE * decays_BGN1CJ[..., :1]
    return weights_BGNPCJ, sums_BGNPCE, new_state_BGFE if state_BGFE is not None else None


def _states(
    phi_BGSF: Tensor,
    v_BGSE: Tensor,
    log_gates_BGS: Tensor | None,
    state_BGFE: Tensor | None,
    queries: int,
    cut: _Layout,
) -> tuple[Tensor, Tensor]:
    """The state before each chunk's band (B, G, N, F, E), and that before the band of a chunk that would come next."""
    # Padding left of the keys fills the first `reach` places: the keys before chunk n's band are the first n·C places.
    length = cut.chunks * cut.chunk
    v_BGNCE = F.pad(v_BGSE[:, :, :queries], (0, 0, 0, length - queries)).unflatten(2, (cut.chunks, cut.chunk))
    phi_BGNCF = phi_BGSF[:, :, :length].unflatten(2, (cut.chunks, cut.chunk))
    if log_gates_BGS is not None:
        log_gates_BGNC = F.pad(log_gates_BGS[:, :, :queries], (0, length - queries)).unflatten(2, (cut.chunks, -1))
        every = torch.ones_like(log_gates_BGNC, dtype=torch.bool)
        phi_BGNCF = phi_BGNCF * decays(log_gates_BGNC, every)[..., 1:, None]
    sums_BGNFE = phi_BGNCF.mT @ v_BGNCE
    before_BGFE = torch.zeros_like(sums_BGNFE[:, :, 0]) if state_BGFE is None else state_BGFE
    states_BGNFE = before_BGFE[:, :, None]
    if log_gates_BGS is not None:
        states_BGNFE = _decayed_sums(torch.cat([states_BGNFE, sums_BGNFE], dim=2), log_gates_BGNC.sum(-1))
        return states_BGNFE[:, :, :-1], states_BGNFE[:, :, -1]
    if cut.chunks > 1:
        states_BGNFE = torch.cat([states_BGNFE, sums_BGNFE[:, :, :-1]], dim=2).cumsum(2)
    return states_BGNFE, states_BGNFE[:, :, -1] + sums_BGNFE[:, :, -1]


def _decayed_sums(x_BGMFE: Tensor, log_gates_BGN: Tensor) -> Tensor:
    """s_0 = x_0, s_n = exp(log_gates_n-1) · s_n-1 + x_n, of M = N + 1: (B, G, M, F, E).

    As a product with all decays from one to another, M·M numbers of a head: few beside the states themselves.
    """
    M = x_BGMFE.shape[2]
    before_MN = torch.ones(M, M - 1, dtype=torch.bool, device=x_BGMFE.device).tril(-1)
    decays_BGMM = decays(log_gates_BGN[:, :, None], before_MN).tril()
    return (decays_BGMM @ x_BGMFE.flatten(3)).view_as(x_BGMFE)


def normalised(near: Tensor, far: Tensor | None, branch: Branch, dropped: Tensor | None = None) -> Tensor:
    """Numerators (…, D) over denominators (…, 1) of the branches that count, from both together (…, E).

    dropped: bool, broadcasts to (…, 1).
    """
    if far is None or branch == "window":
        total = near
    else:
        none_far = far[..., -1:] == 0  # the products of features are positive
        if branch == "linear":
            near = near * none_far
        elif dropped is not None:
            near = near * (none_far | ~dropped)
        total = near + far
    denominator = total[..., -1:]
    return total[..., :-1] / denominator.masked_fill(denominator == 0, 1.0)


def _shares(weights: Tensor) -> Tensor:
    """Weights divided by their sum along the last dimension; zeros stay zeros."""
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)
