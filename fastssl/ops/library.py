"""Ops of torch.library: for each backend one of the same schema, with a fake kernel and an autograd formula."""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from fastssl import _extension
from fastssl.errors import FastsslError
from fastssl.kernels import interpreted, unavailable
from fastssl.ops import memory
from fastssl.ops.backend import Implementation

LIBRARY = torch.library.Library("fastssl", "FRAGMENT")
FUSED = ("native", "triton")  # C++ for CPUs, Triton for GPUs
COMPILED = ("native", "cuda")  # C++ for both
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def define(
    name: str,
    schema: str,
    *,
    kernel: str | None = None,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[[str], Callable[..., Any]] | None = None,
) -> None:
    """Define the ops ``fastssl::{name}_native`` and ``fastssl::{name}_triton`` or, without `kernel`, ``..._cuda``.

    The compiled kernels register themselves when the extension is loaded. None is an autocast op: the kernels take half
    inputs and compute in float32; what autocast does to a loss's dtype, the public functions do.

    Args:
        name: of the op, without the backend.
        schema: arguments and results, in the dispatcher's language.
        kernel: the Triton launcher, as "module.function" below fastssl.kernels; imported at the first call. None
            if the GPU's kernel is compiled too.
        fake: the results' shapes and dtypes.
        setup_context: as in `torch.library.register_autograd`.
        backward: given the backend's name, the formula as in `torch.library.register_autograd`. Without one, the
            op is itself part of a backward, and an error when that is differentiated.
    """
    for backend in FUSED if kernel else COMPILED:
        op = f"{name}_{backend}"
        LIBRARY.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastssl::{op}", fake, lib=LIBRARY)
        if schema.endswith("-> ()"):
            LIBRARY.impl(op, _in_place(getattr(torch.ops.fastssl, op).default), "ADInplaceOrView", with_keyset=True)
            continue
        formula = _refuse_second_derivative if backward is None else backward(backend)
        torch.library.register_autograd(f"fastssl::{op}", formula, setup_context=setup_context, lib=LIBRARY)
        if backward is None:
            torch.library.register_vmap(f"fastssl::{op}", one_by_one(getattr(torch.ops.fastssl, op)), lib=LIBRARY)
    if kernel is None:
        return
    module, function = kernel.rsplit(".", 1)

    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"fastssl.kernels.{module}"), function)(*arguments)

    for key in ("CUDA", "CPU") if interpreted() else ("CUDA",):
        LIBRARY.impl(f"{name}_triton", launch, key)


def _in_place(op: Any) -> Callable[..., None]:
    """What autograd must know of an op that writes to its arguments: that tensors saved for backward have changed."""
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def bump_versions(keys: Any, *arguments: Any) -> None:
        for i in written:
            increment_version(arguments[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return bump_versions


def implementations(function: Callable[..., Any]) -> dict[str, Implementation]:
    """The backends of an op with a Triton kernel; `function` takes the backend's name first."""
    triton_devices = frozenset({"cuda", "cpu"} if interpreted() else {"cuda"})
    return {
        "native": Implementation(partial(function, "native"), frozenset({"cpu"}), DTYPES, _extension.missing()),
        "triton": Implementation(partial(function, "triton"), triton_devices, DTYPES, unavailable(), _too_old),
    }


def compiled_implementations(function: Callable[..., Any]) -> dict[str, Implementation]:
    """The backends of an op without one, for tensors of any dtype; `function` takes the backend's name first."""
    return {
        "native": Implementation(partial(function, "native"), frozenset({"cpu"}), missing=_extension.missing()),
        "cuda": Implementation(partial(function, "cuda"), frozenset({"cuda"}), missing=_extension.missing_cuda()),
    }


def _too_old(device: torch.device) -> str | None:
    """Why the Triton kernels, made for NVIDIA chips from sm_80 on, do not run on `device`; None when they do."""
    return _chip_too_old(device)  # torch.compile before 2.12 takes a cached function that an object holds for a method


@cache
def _chip_too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is made for NVIDIA's chips"
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs a chip from sm_80 on, and {device} is of sm_{major}{minor}"


def call(name: str, backend: str, *arguments: Any) -> Any:
    """Call ``fastssl::{name}_{backend}``."""
    return getattr(torch.ops.fastssl, f"{name}_{backend}")(*arguments)


def beyond_the_kernels(tensors: list[Tensor]) -> str | None:
    """Why only plain PyTorch computes with these tensors, or None: it knows transforms and wrappers such as DTensor."""
    if functorch():
        return "inside a functorch transform"
    if torch.compiler.is_compiling():
        return None
    kinds = {type(x) for x in tensors} - memory.PLAIN
    return next((f"a tensor is a {kind.__name__}" for kind in kinds if is_traceable_wrapper_subclass_type(kind)), None)


def functorch() -> bool:
    """Whether a transform of torch.func is active: the fused ops have no rules for them."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def captured_without_gradients(op: str) -> FastsslError:
    """The error of a backward whose forward was told that nobody asks for gradients."""
    return FastsslError(
        f"{op}: this graph was captured (exported, traced) when no input asked for a gradient, so the kernels computed "
        "none; capture it again with inputs that require one"
    )


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise when a tangent would get lost: the fused kernels know reverse mode only."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise FastsslError(f"{op}: the fused kernels have no forward-mode derivative; {_REMEDY}")


def scale_rows(grad: Tensor, rows: Tensor, dtype: torch.dtype, inputs: list[Tensor]) -> Tensor:
    """Row i of `rows` times grad[i]: what is left to do in backward when forward has computed the gradients.

    Args:
        grad: N.
        rows: N or N×D, gradients of the N losses.
        dtype: of the result.
        inputs: all that `rows` depend on, so that a second derivative is refused instead of wrong.
    """
    if not torch.is_grad_enabled():
        return _scale_rows(grad, rows, dtype, inputs)
    result: Tensor = torch.ops.fastssl.scale_rows(grad, rows, dtype, inputs)
    return result


def _scale_rows(grad: Tensor, rows: Tensor, dtype: torch.dtype, inputs: list[Tensor]) -> Tensor:
    return (grad.reshape(-1, *[1] * (rows.dim() - 1)) * rows).to(dtype)


def one_by_one(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """A vmap rule: call `function` for each element of the batch. For backward with batched incoming gradients."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        results = [
            function(*(x if dim is None else x.select(dim, at) for x, dim in zip(arguments, in_dims, strict=True)))
            for at in range(info.batch_size)
        ]
        return torch.stack(results), 0

    return rule


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise FastsslError(f"the fused kernels have no second derivative; {_REMEDY}")


_REMEDY = 'for this one, call the op inside `with fastssl.ops.use_backend("reference"):`'

LIBRARY.define(
    "scale_rows(Tensor grad, Tensor rows, ScalarType dtype, Tensor[] inputs) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("scale_rows", _scale_rows, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastssl::scale_rows", lambda grad, rows, dtype, inputs: rows.new_empty(rows.shape, dtype=dtype), lib=LIBRARY
)
torch.library.register_autograd("fastssl::scale_rows", _refuse_second_derivative, lib=LIBRARY)
