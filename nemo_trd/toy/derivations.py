"""Several right derivations of one toy problem: its products may be worked out in any order.

    problem       p 3 * 5 q 4 * 2 r 5 * 6 ?
    order p q r   p 3 * 5 = 1 ; q 4 * 2 = 1 ; r 5 * 6 = 2 ; s 1 + 1 = 2 ; t 2 + 2 = 4 ; #### 4
    order r p q   r 5 * 6 = 2 ; p 3 * 5 = 1 ; q 4 * 2 = 1 ; s 2 + 1 = 3 ; t 3 + 1 = 4 ; #### 4

The sums take the products up as they come, so s = r + p and t = s + q in the second. Three products
have six orders; the task of `task.py` has the first alone, and `errors.py` takes others for errors.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice, permutations
from math import factorial

from nemo_trd.toy import task

Order = tuple[str, ...]  # labels of the products, the one that is worked out first at the front
_STEP = re.compile(rf"(\w+) (\d) ([*+]) (\d) = (?:\d {task.NO} )*(\d)")


def first_orders(products: int, count: int) -> list[Order]:
    """The first so many orders of a problem with so many products, that of its text before all."""
    return [*islice(permutations(task.product_labels(products)), count)]


ORDERS = first_orders(task.USUAL, factorial(task.USUAL))


def draw_order(rng: random.Random, products: int, weights: Sequence[int]) -> Order:
    """One of the first orders, as often as its weight says.

    Draws nothing where there is one weight alone.
    """
    orders = first_orders(products, len(weights))
    return orders[0] if len(orders) == 1 else rng.choices(orders, weights)[0]


def reordered(factors: task.Factors, order: Order) -> task.Factors:
    """The problem that has as its first product the one that `order` has first, and so on."""
    labels = task.product_labels(len(factors))
    return tuple(factors[labels.index(label)] for label in order)


def relabelled(text: str, order: Order) -> str:
    """A text on `reordered(factors, order)`, as the text on `factors` that it is in this order."""
    labels = dict(zip(task.product_labels(len(order)), order, strict=True))
    return " ".join(labels.get(word, word) for word in text.split())


def solution(factors: task.Factors, order: Order) -> str:
    """The worked solution in this order, without slips."""
    return relabelled(task.solution(reordered(factors, order)), order)


def derivation(factors: task.Factors, text: str) -> Order | None:
    """The order in which a right derivation works out the products; None: the text is none.

    Right is a text in which every product is worked out once, with its own factors, every sum adds
    two of the numbers that came before, none of them is added twice, each number follows
    from its operands unless it is taken back, and the number that is left at the end is the answer.
    The two operands of a step may change places, and so may the sums' terms among each other.
    """
    *steps, last = text.split(" ; ")
    products = len(factors)
    pairs = dict(zip(task.product_labels(products), factors, strict=True))
    labels: list[str] = []
    unused: Counter[int] = Counter()  # numbers worked out, and not added up so far
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        label, sign = match[1], match[3]
        a, b, result = int(match[2]), int(match[4]), int(match[5])
        labels.append(label)
        if label in pairs:
            follows = sign == "*" and Counter(pairs[label]) == Counter((a, b))
        else:
            follows = sign == "+" and Counter((a, b)) <= unused
            unused -= Counter((a, b))
        if not follows or result != (a * b if sign == "*" else a + b) % task.MODULUS:
            return None
        unused[result] += 1
    if Counter(labels) != Counter([*pairs, *task.sum_labels(products)]):
        return None
    if [last] != [f"#### {number}" for number in unused.elements()]:
        return None
    return tuple(label for label in labels if label in pairs)
