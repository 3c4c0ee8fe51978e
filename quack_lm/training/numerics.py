"""What torch may do to the bits of a result: TF32, cuDNN, sums in bfloat16, and algorithms without a fixed order."""

import os

import torch


def set_numerics(*, is_deterministic: bool) -> None:
    """Set torch's switches for this process, before it first multiplies matrices on a GPU.

    Torch's defaults but for cuDNN's TF32, stated here: a result should not depend on what a later torch or another
    library prefers.
    """
    # Float32 means float32, never TF32: for runs that are compared to the last digit. Speed is what bfloat16 is for.
    torch.set_float32_matmul_precision("highest")
    # The models have no convolution; one would be as exact, by an algorithm that no measurement chooses.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    # A bfloat16 product that cuBLAS splits along the summed axis may add up its parts in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    if is_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once
    torch.use_deterministic_algorithms(is_deterministic)
