"""The peak speed of known GPUs, the denominator of model FLOPs utilization (MFU)."""

import re

_PEAKS: tuple[tuple[str, float], ...] = (
    # H100 datasheet: 1,979 (SXM), 1,671 (NVL) and 1,513 (PCIe) TFLOPS with sparsity, which is twice the dense rate.
    (r"H100 80GB HBM3", 989.5e12),
    (r"H100 NVL", 835.5e12),
    (r"H100 PCIe", 756.5e12),
    # H200 datasheet: 1,979 (SXM) and 1,671 (NVL) with sparsity.
    (r"H200", 989.5e12),
    (r"H200 NVL", 835.5e12),
    # GH200 datasheet: 1,979 with sparsity.
    (r"GH200 \d+GB", 989.5e12),
    # HGX B200 datasheet: 36 PFLOPS with sparsity of eight GPUs.
    (r"B200", 2250e12),
    # A100 datasheet: 312, of SXM and PCIe, 40 GB and 80 GB.
    (r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe", 312e12),
    # L40S datasheet: 362.05.
    (r"L40S", 362.05e12),
    # Ada GPU architecture whitepaper, appendix A: 165.2 with accumulation in FP32.
    (r"GeForce RTX 4090", 165.2e12),
)
"""By names as the driver has them, without "NVIDIA": bf16 products of dense matrices on tensor cores, FLOP/s."""


def dense_peak(name: str, dtype: str) -> float | None:
    """The FLOP/s of dense products at most, by the data sheet of a GPU; None if it, or the dtype, is not in the table.

    Args:
        name: as torch.cuda.get_device_name has it; a part of a GPU (MIG) has another name and is unknown.
        dtype: of the products; only "bf16" is known.
    """
    own = name.removeprefix("NVIDIA ")
    known = (peak for pattern, peak in _PEAKS if re.fullmatch(pattern, own))
    return next(known, None) if dtype == "bf16" else None
