"""A product with weights whose gradient suits XLA's CPU backend.

That backend transposes the left operand of the product that gives the gradient of the weights. It fuses the
transpose with whatever computes the operand, so every input of that computation is read with the stride
of a row. JAX puts the cotangent on the left, which in an MLP is the wider of the two and the result of the
longest computation; here it is the narrower operand.
"""

import jax
import jax.numpy as jnp


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x @ kernel: [..., D], [D, F] -> [..., F]."""
    return _with_gradient(jnp.einsum("...D,DF->...F", x, _constant(kernel)), x, kernel)


@jax.custom_vjp
def _constant(kernel: jax.Array) -> jax.Array:
    """Identity without a gradient.

    Unlike `stop_gradient`, a primitive, it makes no new value that would be saved for the backward pass,
    where a kernel is gathered again (models/remat.py) or read from the stacked weights. The gradient that
    JAX computes for its argument is unused, so the compiler removes it.
    """
    return kernel


_constant.defvjp(lambda kernel: (kernel, None), lambda *_: (None,))


@jax.custom_vjp
def _with_gradient(product: jax.Array, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Identity on `product`; the backward pass computes the gradient of the kernel.

    The product itself stays outside, where a policy of rematerialisation finds it.
    """
    return product


def _forward(product: jax.Array, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return product, x


def _backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    x_CD, cotangent_CF = (y.reshape(-1, y.shape[-1]) for y in (x, cotangent))
    if x_CD.shape[1] <= cotangent_CF.shape[1]:
        return cotangent, None, jnp.einsum("CD,CF->DF", x_CD, cotangent_CF)
    return cotangent, None, jnp.einsum("CF,CD->FD", cotangent_CF, x_CD).T


_with_gradient.defvjp(_forward, _backward)
