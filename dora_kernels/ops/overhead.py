"""What each form of a layer or a block costs beyond the frozen base's GEMMs, counted in elements, launch by launch.

Where a launch also forms s·B·A or its like, it takes as long as `product` times the product's elements, if that is more
than what it moves; and `shortest` at least. Left out is what both forms do alike but for x and h, and what has no size
but the rank's.
"""

from collections.abc import Callable

from .problem import Problem

Overhead = Callable[[str, Problem, float, int], float]

GLU_RANK = 64
"""Up to this rank the passes over gate and up read B once a program."""


def layer_overhead(space: str, problem: Problem, product: float = 0.0, shortest: int = 0) -> float:
    """Of one layer, forward and, where it trains, backward."""
    tokens, features, inputs = problem.tokens, problem.out_features, problem.in_features
    mn, mk, nk = tokens * features, tokens * inputs, features * inputs

    def launch(moved: int, products: int = 0) -> float:
        return max(moved, product * products, shortest)

    h, grad_h, grad_A, norm = launch(mk), launch(mn), launch(mk), launch(nk, nk)
    if space == "token":
        forward = norm + h + launch(2 * mn, mn)
        # dZ and dm from dy and y; dh A, which the base's GEMM reads and adds to.
        backward = launch(3 * mn) + grad_h + grad_A + launch(mk) + mk
    else:
        # A bias that is added after the product was saved costs one more pass over the output. h, for dB alone, is made
        # in the backward, of A in x's dtype.
        merge, keeps_product = launch(2 * nk, nk), problem.has_bias and problem.trains_magnitude
        forward = norm + merge + (launch(2 * mn) if keeps_product else 0)
        backward = launch(0) + h + launch(2 * mn) + grad_h + grad_A + merge
    return forward + (backward if problem.trains else 0)


def experts_overhead(experts: int, gated: bool = False) -> Overhead:
    """Of a stack of experts whose tokens, all experts' together, are spread evenly.

    `gated`: act(gate) ⊙ up is counted, too. In token space it is the same pass, in weight space the model's own.
    """

    def overhead(space: str, problem: Problem, product: float = 0.0, shortest: int = 0) -> float:
        tokens, active = problem.tokens, min(experts, problem.tokens)
        mn, mk, nk = (
            tokens * problem.out_features, tokens * problem.in_features, problem.out_features * problem.in_features
        )  # fmt: skip

        def launch(moved: float, products: int = 0) -> float:
            return max(moved, product * products, shortest)

        h, grad_h, grad_A, norm = launch(mk), launch(mn), launch(mk), launch(active * nk, active * nk)
        if space == "token":
            forward = norm + h + launch(1.5 * mn if gated else 2 * mn, mn)
            backward = launch(3 * mn) + grad_h + grad_A + launch(mk) + launch(3 * mk)
            backward += launch(2.5 * mn, mn) if gated else 0
        else:
            # Of each expert a merge, and a product that is a launch of its own, where the base has one for all.
            merged = active * (launch(2 * nk, nk) + shortest)
            forward = norm + merged + (launch(2 * mn) + active * shortest if problem.has_bias else 0)
            backward = h + launch(2 * mn) + grad_h + grad_A + merged
            if gated:
                # act and a product; then two products, act's derivative, and both gradients side by side.
                forward += launch(mn) + launch(1.5 * mn)
                backward += 3 * launch(1.5 * mn) + launch(2 * mn)
        return forward + (backward if problem.trains else 0)

    return overhead


def glu_overhead(space: str, problem: Problem, product: float = 0.0, shortest: int = 0) -> float:
    """Of a gated MLP's gate and up, with `out_features` 2 I, forward and backward.

    Both forms have the same pass over the products each way. In token space it forms s h Bᵀ besides.
    """
    tokens, features, inputs = problem.tokens, problem.out_features, problem.in_features
    mn, mk, nk = tokens * features, tokens * inputs, features * inputs

    def launch(moved: float, products: float = 0.0) -> float:
        return max(moved, product * products, shortest)

    # Above, B is cut again for each block of tokens.
    again = 1.0 if problem.rank <= GLU_RANK else 2.5
    h, products = launch(mk), again * mn if space == "token" else 0.0
    # Gate and up in, a out; then da, gate and up in, a and both gradients out.
    passes = launch(1.5 * mn, products) + launch(3 * mn, products)
    if space == "token":
        # dh A, which the base's GEMM reads and adds to.
        return launch(nk, nk) + h + passes + launch(mk) + mk
    return launch(nk, nk) + 2 * launch(2 * nk, nk) + h + passes
