"""GPUs by the full name that `torch.cuda.get_device_name` gives them: peak and memory, from the vendors' data sheets.

A name that is not here is unknown: similar names have other clocks, memories and numbers of units.
"""

import math
import re
from dataclasses import dataclass

from quack_lm.errors import UserError


@dataclass(frozen=True)
class Accelerator:
    """What torch shows as one device.

    `tflops` is the peak of dense bfloat16 products with sums in float32: half of the figures with sparsity, and on
    GeForce cards half of those with sums in float16. `memory_gib` is what data sheets call GB, but for cards that show
    less, such as those with GDDR6, of which error correction takes a sixteenth.
    """

    tflops: float
    memory_gib: float
    mig_slices: int = 0  # of which MIG instances are made, on cards that can be divided


MIG = 7

ACCELERATORS = {
    # Ampere
    "NVIDIA A100-SXM4-80GB": Accelerator(312, 80, MIG),
    "NVIDIA A100-SXM4-40GB": Accelerator(312, 40, MIG),
    "NVIDIA A100-PCIE-40GB": Accelerator(312, 40, MIG),
    "NVIDIA A100 80GB PCIe": Accelerator(312, 80, MIG),
    "NVIDIA A800-SXM4-80GB": Accelerator(312, 80, MIG),
    "NVIDIA A800 80GB PCIe": Accelerator(312, 80, MIG),
    "NVIDIA A30": Accelerator(165, 24, mig_slices=4),
    "NVIDIA A40": Accelerator(149.7, 45),
    "NVIDIA A10": Accelerator(125, 22.5),
    "NVIDIA A10G": Accelerator(70, 22.5),
    "NVIDIA RTX A6000": Accelerator(154.8, 48),
    "NVIDIA GeForce RTX 3090": Accelerator(71, 24),
    "NVIDIA GeForce RTX 3090 Ti": Accelerator(80, 24),
    # Ada
    "NVIDIA L4": Accelerator(121, 22.5),
    "NVIDIA L40": Accelerator(181, 45),
    "NVIDIA L40S": Accelerator(362, 45),
    "NVIDIA RTX 6000 Ada Generation": Accelerator(364.2, 48),
    "NVIDIA GeForce RTX 4080": Accelerator(97.5, 16),
    "NVIDIA GeForce RTX 4090": Accelerator(165.2, 24),
    # Hopper
    "NVIDIA H100 80GB HBM3": Accelerator(989, 80, MIG),
    "NVIDIA H100 PCIe": Accelerator(756, 80, MIG),
    "NVIDIA H100 NVL": Accelerator(835, 94, MIG),
    "NVIDIA H200": Accelerator(989, 141, MIG),
    "NVIDIA H200 NVL": Accelerator(835, 141, MIG),
    "NVIDIA GH200 480GB": Accelerator(989, 96, MIG),
    "NVIDIA GH200 144G HBM3e": Accelerator(989, 144, MIG),
    # Blackwell
    "NVIDIA B200": Accelerator(2250, 180, MIG),
    "NVIDIA GB200": Accelerator(2500, 186, MIG),
    "NVIDIA B300 SXM6 AC": Accelerator(2250, 268, MIG),
    "NVIDIA GB300": Accelerator(2500, 278, MIG),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Accelerator(503.8, 96, mig_slices=4),
    "NVIDIA GeForce RTX 5080": Accelerator(112.6, 16),
    "NVIDIA GeForce RTX 5090": Accelerator(209.5, 32),
    # CDNA; of an MI250 torch shows each of the two dies.
    "AMD Instinct MI210": Accelerator(181, 64),
    "AMD Instinct MI250": Accelerator(181, 64),
    "AMD Instinct MI250X": Accelerator(191.5, 64),
    "AMD Instinct MI300A": Accelerator(980.6, 128),
    "AMD Instinct MI300X": Accelerator(1307.4, 192),
    "AMD Instinct MI300X OAM": Accelerator(1307.4, 192),
    "AMD Instinct MI325X": Accelerator(1307.4, 256),
    "AMD Instinct MI355X": Accelerator(2516.6, 288),
    "AMD Instinct MI355 OAM": Accelerator(2516.6, 288),
    # RDNA
    "AMD Radeon RX 7900 XTX": Accelerator(122.8, 24),
}


def find_accelerator(name: str) -> Accelerator | None:
    """The device with this full name; None where it is not known.

    A MIG instance has the share of the card's units that NVIDIA's MIG guide gives, 3/7 for `<card> MIG 3g.40gb`, and
    the memory that its name says.
    """
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    instance = re.fullmatch(r"(?P<card>.+) MIG (?P<slices>\d)g\.(?P<memory>\d+)gb(\+me(\.all)?)?", name)
    card = ACCELERATORS.get(instance["card"]) if instance else None
    if instance is None or card is None:
        return None
    slices, memory = int(instance["slices"]), int(instance["memory"])
    if not 1 <= slices <= card.mig_slices or memory > math.ceil(1.01 * card.memory_gib):  # names are rounded up
        return None
    return Accelerator(card.tflops * slices / card.mig_slices, memory)


def named_accelerator(text: str) -> tuple[str, Accelerator]:
    """The full name, and the device, that a name or the beginning of one means: `H100`, `H200 NVL`, `RTX 4090`.

    Beginnings are those after the vendor and the series. Of several names the first in the table; UserError where there
    is none.
    """
    exact = find_accelerator(text)
    if exact is not None:
        return text, exact
    short = {re.sub(r"^(NVIDIA|AMD)( GeForce| Instinct| Radeon)? ", "", name): name for name in ACCELERATORS}
    beginning = re.compile(rf"{re.escape(text)}(?![^\s-])", re.IGNORECASE)
    name = next((name for own, name in short.items() if beginning.match(own)), None)
    if name is None:
        raise UserError(f"card={text} is unknown; give a full name, or the beginning of one of: {', '.join(short)}")
    return name, ACCELERATORS[name]
