"""Linearized attention with an exact cache (arXiv 2505.23666): far keys that the state predicts badly are not in it.

Positions are cut into blocks of C = `window`, from a sequence's first real token on. At the end of a block the C oldest
keys outside of the state, which have left the window, and the X entries of the cache are ranked by the errors of their
values as the state without them predicts them,

    |v_j - phi_k(k_j)^T U / (phi_k(k_j)^T z)|^2        U, z: the columns of the state; 0 for an empty one

The X with the largest errors are the new entries, and the others join the state. The error is absolute, as it comes
into the output: that changes by a key's weight times the error of its value, however long the value itself is. The
first SINKS tokens stay whatever their errors are, and of equal errors the older token's counts as the larger. Within a
block nothing changes: near a query are the entries and all keys that never were candidates, under one c_n and gamma.

One function ranks the candidates of any block, in the same shapes: training, a prompt in any pieces and single tokens
choose alike, for the same keys and values to the last bit. The choice has no gradient.

Shape suffixes as in `linear_attention`, where here C = K - R: a chunk is a block, and its band all its keys, of which R
come before it. L = (N + 1)·C places, the first of them that of chunk 0's band; X entries, Z = X + C candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slope_cli.config.methods import SINKS
from slope_cli.linearize.linear_attention import (
    Attended,
    Branch,
    Entries,
    Maps,
    Pattern,
    exp_below_max,
    normalised,
    with_ones,
)


class _Scan(NamedTuple):
    """What is near each chunk: keys, values and whether they are real, and the state and the entries at its beginning.

    phase_B: the places of chunk 0 before the first query; None for 0. states, entries: of each chunk; where some were
    given also those behind the last one, which a sequence that does not reach that far has from where it ends.
    """

    phase_B: Tensor | None
    chunks: int
    k_BGLD: Tensor
    v_BGLE: Tensor
    keep_B1L1: Tensor
    states: list[Tensor]
    entries: list[Entries]


def attend_cached(
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
    entries: Entries | None = None,
    first_B: Tensor | None = None,
    branch: Branch = "both",
    dropped_BH: Tensor | None = None,
) -> Attended:
    """`attend` for a pattern with a cache, which is causal.

    Args:
        state_BGFE, entries: of the keys before those given, both or neither; with them the new ones are returned.
        first_B: position of the first query, counted from the first real token; None for 0, if there is no state.
        branch: "window" is all that is exact, the entries among it.
        Others, and what is returned, as in `attend`.
    """
    with torch.autocast(q_BHTD.device.type, enabled=False):
        dtype = torch.float64 if q_BHTD.dtype == torch.float64 else torch.float32
        q_BHTD, k_BGSD, v_BGSD = q_BHTD.to(dtype), k_BGSD.to(dtype), v_BGSD.to(dtype)
        (B, _, T, D), G, size, reach = q_BHTD.shape, k_BGSD.shape[1], pattern.window, pattern.always_near
        carried = None if state_BGFE is None or entries is None else (state_BGFE, entries)
        scan = _scan(T, k_BGSD, v_BGSD, keep_BS, maps, pattern, first_B, carried)
        states_BGNFE = torch.stack(scan.states[: scan.chunks], dim=2)
        keys_BGNXD, values_BGNXD, positions_BGNX = (
            torch.stack(part, dim=2) for part in zip(*scan.entries[: scan.chunks], strict=True)
        )

        phi_q_BHTF = maps.q(q_BHTD * (scale * D**0.5))
        q_BGNPCD, phi_q_BGNPCF = (_chunked(x, G, scan.phase_B, scan.chunks, size) for x in (q_BHTD, phi_q_BHTF))
        k_BGNKD, v_BGNKE = _bands(scan.k_BGLD, size, reach), _bands(scan.v_BGLE, size, reach)
        scores = scale * (q_BGNPCD @ torch.cat([keys_BGNXD, k_BGNKD], dim=3).mT[:, :, :, None])
        queries_BC = torch.arange(q_BGNPCD.shape[4], device=q_BHTD.device)[None]
        queries_BC = queries_BC if T > 1 or scan.phase_B is None else scan.phase_B[:, None]
        seen_BCK = torch.arange(reach + size, device=q_BHTD.device) <= reach + queries_BC[:, :, None]
        keep_BGNPCK = _bands(scan.keep_B1L1, size, reach).mT[:, :, :, None]
        seen = (seen_BCK[:, None, None, None] & keep_BGNPCK).expand(B, G, -1, -1, -1, -1)
        filled = (positions_BGNX >= 0)[:, :, :, None, None].expand(*seen.shape[:-1], -1)
        gamma = mix_H.to(dtype).view(G, 1, -1, 1, 1)
        near = gamma * exp_below_max(scores, torch.cat([filled, seen], dim=-1))
        near_BGNPCE = near @ torch.cat([with_ones(values_BGNXD), v_BGNKE], dim=3)[:, :, :, None]
        dropped = None if dropped_BH is None else dropped_BH.view(B, G, 1, -1, 1, 1)
        y_BGNPCD = normalised(near_BGNPCE, phi_q_BGNPCF @ states_BGNFE[:, :, :, None], branch, dropped)
        y_BHTD = y_BGNPCD.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        y_BHTD = y_BHTD if T == 1 else _from(y_BHTD, scan.phase_B, T)
        new = (None, None) if carried is None else (scan.states[-1], scan.entries[-1])
        return Attended(y_BHTD[:, :, :T], *new)


@torch.no_grad()
def entries_of_queries(
    k_BGTD: Tensor, v_BGTD: Tensor, keep_BT: Tensor, maps: Maps, pattern: Pattern, first_B: Tensor
) -> Tensor:
    """The positions of the entries in the cache of each query, (B, G, T, X), int64; -1 for none. Others as above."""
    T = k_BGTD.shape[2]
    scan = _scan(T, k_BGTD, v_BGTD, keep_BT, maps, pattern, first_B, None)
    positions_BGNX = torch.stack([entries.positions for entries in scan.entries], dim=2)
    chunk_BT = (first_B.remainder(pattern.window)[:, None] + torch.arange(T, device=k_BGTD.device)) // pattern.window
    return positions_BGNX.take_along_dim(chunk_BT[:, None, :, None], dim=2)


def no_entries(k_BGSD: Tensor, v_BGSD: Tensor, count: int) -> Entries:
    """An empty cache of so many entries for keys and values like these."""
    keys, values = (x.new_zeros(*x.shape[:2], count, x.shape[3]) for x in (k_BGSD, v_BGSD))
    return Entries(keys, values, torch.full(keys.shape[:3], -1, device=keys.device))


# A compiler would unroll it: minutes for a long sequence, and anew for each length.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _scan(
    queries: int,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    keep_BS: Tensor | None,
    maps: Maps,
    pattern: Pattern,
    first_B: Tensor | None,
    carried: tuple[Tensor, Entries] | None,
) -> _Scan:
    (B, G, S, _), T, size, reach = k_BGSD.shape, queries, pattern.window, pattern.always_near
    keep_BS = k_BGSD.new_ones(B, S, dtype=torch.bool) if keep_BS is None else keep_BS
    phase_B = None if first_B is None else first_B.remainder(size)
    # A single token is a chunk by itself. Others begin somewhere in the first chunk, and may take one more to end.
    chunks = -(-(T if phase_B is None or T == 1 else T + size - 1) // size)

    places = (chunks + 1) * size
    around = (0, 0, pattern.lookback - (S - T), places - reach - T)
    begin_B = None if phase_B is None else size - 1 - phase_B
    given = (k_BGSD, with_ones(v_BGSD) * keep_BS[:, None, :, None], keep_BS[:, None, :, None])
    padded = (F.pad(x, around) for x in given)
    k_BGLD, v_BGLE, keep_B1L1 = (_from(x[:, :, size - 1 :] if begin_B is None else x, begin_B, places) for x in padded)
    positions_L = torch.arange(places, device=k_BGSD.device) - reach
    positions_BL = positions_L.expand(B, -1)
    if first_B is not None and phase_B is not None:
        positions_BL = positions_BL + (first_B - phase_B)[:, None]
    positions_BGL = positions_BL.masked_fill(~keep_B1L1[:, 0, :, 0], -1)[:, None].expand(-1, G, -1)

    if carried is None:
        features = maps.k(k_BGLD[:, :, :1]).shape[-1]
        state_BGFE = k_BGLD.new_zeros(B, G, features, v_BGLE.shape[-1])
        entries = no_entries(k_BGLD, v_BGSD, pattern.cache)
    else:
        state_BGFE, (keys, values, positions) = carried
        entries = Entries(keys.to(k_BGSD.dtype), values.to(k_BGSD.dtype), positions)
    scan = _Scan(phase_B, chunks, k_BGLD, v_BGLE, keep_B1L1, [state_BGFE], [entries])
    for n in range(chunks - (carried is None)):
        block = slice(n * size, (n + 1) * size)
        candidates = k_BGLD[:, :, block], v_BGLE[:, :, block], positions_BGL[:, :, block]
        ended_B = None if carried is None or phase_B is None else phase_B + T >= (n + 1) * size
        state_BGFE, entries = _after(state_BGFE, entries, *candidates, maps, ended_B)
        scan.states.append(state_BGFE)
        scan.entries.append(entries)
    return scan


def _after(
    state_BGFE: Tensor,
    entries: Entries,
    k_BGCD: Tensor,
    v_BGCE: Tensor,
    positions_BGC: Tensor,
    maps: Maps,
    ended_B: Tensor | None,
) -> tuple[Tensor, Entries]:
    """The state and the entries after a block, in the sequences in which it has ended (None: in all).

    v: zeros where there is no key, and positions -1. The entries are in the order of their positions, empty ones
    anywhere.
    """
    if ended_B is not None and ended_B.device.type == "cpu" and not ended_B.any():  # a GPU would have to wait
        return state_BGFE, entries
    count = entries.positions.shape[2]
    k_BGZD = torch.cat([entries.keys, k_BGCD], dim=2)
    positions_BGZ = torch.cat([entries.positions, positions_BGC], dim=2)
    v_BGZE = torch.cat([with_ones(entries.values) * (entries.positions >= 0)[..., None], v_BGCE], dim=2)
    phi_BGZF = maps.k(k_BGZD)
    with torch.no_grad():
        predicted_BGZE = phi_BGZF @ state_BGFE
        predicted_BGZD = predicted_BGZE[..., :-1] / predicted_BGZE[..., -1:].masked_fill(
            predicted_BGZE[..., -1:] == 0, 1
        )
        error_BGZ = (v_BGZE[..., :-1] - predicted_BGZD).square().sum(-1)
        error_BGZ = error_BGZ.masked_fill(positions_BGZ < SINKS, torch.inf).masked_fill(positions_BGZ < 0, -torch.inf)
        order_BGZ = error_BGZ.argsort(dim=-1, descending=True, stable=True)
        stay_BGX, leave_BGC = (part.sort(-1).values for part in order_BGZ.split([count, k_BGCD.shape[2]], dim=-1))
    left_BGCF, left_BGCE = (x.take_along_dim(leave_BGC[..., None], dim=2) for x in (phi_BGZF, v_BGZE))
    keys, values = (x.take_along_dim(stay_BGX[..., None], dim=2) for x in (k_BGZD, v_BGZE[..., :-1]))
    new = Entries(keys, values, positions_BGZ.take_along_dim(stay_BGX, dim=2))
    state = state_BGFE + left_BGCF.mT @ left_BGCE
    if ended_B is None:
        return state, new
    ended = ended_B[:, None, None, None]
    chosen = (torch.where(ended.view(-1, *[1] * (x.ndim - 1)), x, old) for x, old in zip(new, entries, strict=True))
    return torch.where(ended, state, state_BGFE), Entries(*chosen)


def _from(x_BGSI: Tensor, begin_B: Tensor | None, count: int) -> Tensor:
    """So many places of each sequence, (B, G, count, I), from place 0 or these; outside of the S they are anything."""
    if begin_B is None:
        return x_BGSI[:, :, :count]
    index_BS = begin_B[:, None] + torch.arange(count, device=x_BGSI.device)
    index_B1S1 = index_BS.clamp(0, x_BGSI.shape[2] - 1)[:, None, :, None]
    found: Tensor = x_BGSI.take_along_dim(index_B1S1, dim=2)
    return found


def _chunked(x_BHTI: Tensor, groups: int, phase_B: Tensor | None, chunks: int, size: int) -> Tensor:
    """(B, H, T, I) -> (B, G, N, P, C, I), anything where there is no query; of a single token C is 1."""
    if x_BHTI.shape[2] > 1:
        padded_BHLI = F.pad(x_BHTI, (0, 0, 0, chunks * size - x_BHTI.shape[2]))
        x_BHTI = _from(padded_BHLI, None if phase_B is None else -phase_B, chunks * size)
    chunked: Tensor = x_BHTI.unflatten(2, (chunks, -1)).unflatten(1, (groups, -1)).transpose(2, 3)
    return chunked


def _bands(x_BGLI: Tensor, size: int, reach: int) -> Tensor:
    """(B, G, L, I) -> (B, G, N, K, I). Of blocks side by side: gradients come back by slices, not one by one."""
    blocks = x_BGLI.unflatten(2, (-1, size))
    return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:, :reach]], dim=3)
