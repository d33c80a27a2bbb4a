"""The engine alone, on ops defined here: what it records, walks, frees and refuses."""

import gc
import threading
import weakref

import numpy as np
import pytest

from entrenar.tensor import Op, Tensor, is_recording, no_grad


class Times(Op):
    """y = a b"""

    def forward(self, a, b):
        self.save(a, b)
        return a * b

    def backward(self, dy):
        a, b = self.saved
        return dy * b if self.needs[0] else None, dy * a if self.needs[1] else None


class Plus(Op):
    """y = a + b, both gradients the very array that came in"""

    def forward(self, a, b):
        return a + b

    def backward(self, dy):
        return dy, dy


def times(a, b):
    return Times.apply(a, b)


def plus(a, b):
    return Plus.apply(a, b)


def leaf(*values, dtype=np.float64):
    return Tensor(np.array(values, dtype), requires_grad=True)


def test_a_product_has_the_gradients_of_calculus():
    x, y = leaf(2.0, 3.0), leaf(5.0, 7.0)
    times(times(x, y), x).backward(np.array([1.0, 10.0]))
    np.testing.assert_array_equal(x.grad, [2 * 2 * 5, 10 * 2 * 3 * 7])
    np.testing.assert_array_equal(y.grad, [4, 90])


def test_a_chain_of_20000_ops_needs_no_recursion_and_dies_without_the_collector():
    x = leaf(1.0)
    y = x
    for _ in range(20_000):
        y = plus(y, x)
    gc.disable()
    try:
        op = weakref.ref(y.op)
        y.backward()
        assert x.grad == [20_001]
        del y
        assert op() is None
    finally:
        gc.enable()


def test_an_unused_graph_dies_without_the_collector():
    x = leaf(1.0)
    y = x
    for _ in range(20_000):
        y = plus(y, x)
    gc.disable()
    try:
        op = weakref.ref(y.op)
        del y
        assert op() is None
    finally:
        gc.enable()


def test_activations_die_one_by_one_during_backward():
    alive = []

    class Watch(Op):
        def forward(self, a):
            kept = np.array(a)
            self.save(kept)
            alive.append(weakref.ref(kept))
            return a + 0

        def backward(self, dy):
            counts.append(sum(ref() is not None for ref in alive))
            return dy

    counts, y = [], leaf(1.0)
    for _ in range(4):
        y = Watch.apply(y)
    gc.disable()
    try:
        y.backward()
    finally:
        gc.enable()
    assert counts == [4, 3, 2, 1]


def test_gradients_accumulate_over_uses_and_over_calls():
    x = leaf(3.0)
    for _ in range(2):
        plus(plus(x, x), times(x, x)).backward()
    assert x.grad == [2 * (2 + 6)]


def test_two_leaves_never_share_one_gradient_array():
    x, y, dout = leaf(1.0, 2.0), leaf(3.0, 4.0), np.ones(2)
    plus(x, y).backward(dout)
    x.grad *= 5
    np.testing.assert_array_equal(y.grad, [1, 1])
    np.testing.assert_array_equal(dout, [1, 1])


def test_a_gradient_that_is_the_saved_array_is_copied():
    class Dot(Op):
        def forward(self, a, b):
            self.save(a, b)
            return np.dot(a, b)

        def backward(self, dy):
            a, b = self.saved
            return b, a  # right for dy = 1

    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    Dot.apply(x, y).backward()
    x.grad *= 0
    np.testing.assert_array_equal(y.data, [3, 4])


def test_the_same_fresh_array_returned_twice_is_not_added_to_in_place():
    class Twice(Op):
        def forward(self, a, b):
            return a + b

        def backward(self, dy):
            same = dy * 1
            return same, same

    x, y = leaf(1.0), leaf(1.0)
    plus(Twice.apply(x, y), x).backward()
    assert (x.grad, y.grad) == ([2], [1])


def test_intermediate_gradients_are_summed_before_they_go_on():
    x = leaf(2.0)
    seen = []

    class Look(Op):
        def forward(self, a):
            return a * 1

        def backward(self, dy):
            seen.append(dy.copy())
            return dy

    y = Look.apply(x)
    plus(plus(y, y), times(y, y)).backward()
    assert len(seen) == 1 and seen[0] == [6]


# -- outputs that are made again


class Doubled(Op):
    """y = 2 a, which nobody keeps"""

    cheap = True
    calls = 0

    def forward(self, a):
        self.save(a)
        return 2 * a

    def again(self):
        Doubled.calls += 1
        return 2 * self.saved[0]

    def backward(self, dy):
        return 2 * dy


def test_the_output_of_a_cheap_op_dies_and_is_made_again_once_for_all_who_saved_it():
    x, y, z = leaf(3.0, 4.0), leaf(5.0, 7.0), leaf(1.0, 2.0)
    h = Doubled.apply(x)
    out, kept = plus(times(h, y), times(h, z)), weakref.ref(h.data)
    del h
    assert kept() is None
    Doubled.calls = 0
    out.backward(np.ones(2))
    assert Doubled.calls == 1
    np.testing.assert_array_equal(x.grad, 2 * (y.data + z.data))
    np.testing.assert_array_equal(y.grad, 2 * x.data)
    np.testing.assert_array_equal(z.grad, 2 * x.data)


def test_an_output_made_again_is_dropped_before_its_own_ops_backward():
    held = []

    class Watched(Doubled):
        def backward(self, dy):
            held.append(self.remade)
            return super().backward(dy)

    x = leaf(3.0)
    times(Watched.apply(x), x).backward(np.ones(1))
    assert held == [None]


def test_gradients_depend_on_what_again_makes():
    class Wrong(Doubled):
        def again(self):
            return 2.001 * self.saved[0]

    grads = []
    for op in (Doubled, Wrong):
        x, y = leaf(3.0), leaf(5.0)
        times(op.apply(x), y).backward()
        grads.append(y.grad)
    assert grads[0] == [6] and grads[1] != [6]


def test_a_chain_of_20000_cheap_ops_needs_no_recursion():
    class Same(Op):
        cheap = True

        def forward(self, a):
            self.save(a)
            return a * 1

        def again(self):
            return self.saved[0] * 1

        def backward(self, dy):
            return dy

    x = leaf(3.0)
    y = x
    for _ in range(20_000):
        y = Same.apply(y)
    times(y, x).backward()
    assert x.grad == [6]


def test_an_output_that_can_no_longer_be_made_is_a_freed_graph():
    x, y, z = leaf(3.0), leaf(5.0), leaf(7.0)
    h = Doubled.apply(x)
    first, second = times(h, y), times(h, z)
    first.backward()
    with pytest.raises(RuntimeError, match=r"already freed by an earlier backward\(\) \(at Doubled\)"):
        second.backward()


# -- gradients added where they are


class Adding(Op):
    """y = 3 a + b, whose backward adds to what there is of a's gradient"""

    lent: list = []

    def forward(self, a, b):
        return 3 * a + b

    def backward(self, dy):
        total = self.so_far(0)
        Adding.lent.append(total)
        if total is None:
            return 3 * dy, dy
        total += 3 * dy
        return total, dy


def test_a_backward_may_add_to_the_gradient_of_a_leaf():
    x, b = leaf(1.0, 2.0), leaf(1.0, 1.0)
    Adding.lent = []
    for _ in range(3):
        Adding.apply(x, b).backward(np.array([1.0, 10.0]))
    np.testing.assert_array_equal(x.grad, [9, 90])
    assert Adding.lent[0] is None and Adding.lent[1] is Adding.lent[2] is x.grad


def test_a_backward_may_add_to_the_gradient_on_its_way_to_an_op():
    x, b = leaf(1.0, 2.0), leaf(1.0, 1.0)
    Adding.lent = []
    h = times(x, x)
    plus(Adding.apply(h, b), Adding.apply(h, b)).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, 6 * 2 * x.data)
    assert Adding.lent[0] is None and Adding.lent[1] is not None


def test_an_input_that_comes_twice_is_added_to_twice():
    x = leaf(1.0, 2.0)
    for _ in range(2):
        Adding.apply(x, x).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [8, 8])


def test_a_gradient_that_others_hold_is_not_lent():
    x, b, dout = leaf(1.0, 2.0), leaf(1.0, 1.0), np.ones(2)
    Adding.lent = []
    h = times(x, x)
    early = Adding.apply(h, b)
    plus(early, plus(h, b)).backward(dout)  # h's gradient is dout itself when Adding runs
    assert Adding.lent == [None]
    np.testing.assert_array_equal(dout, [1, 1])
    np.testing.assert_array_equal(b.grad, [2, 2])


def test_a_view_of_what_others_hold_is_not_added_to_in_place():
    class Turned(Op):
        def forward(self, a):
            return a[::-1]

        def backward(self, dy):
            return dy[::-1]

    x, b, dout = leaf(1.0, 2.0), leaf(1.0, 1.0), np.ones(2)
    h = times(x, b)
    plus(times(h, b), Turned.apply(h)).backward(dout)
    np.testing.assert_array_equal(dout, [1, 1])
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_a_view_that_only_the_walk_holds_is_added_to_in_place():
    class Reshaped(Op):
        def forward(self, a):
            return a * 1

        def backward(self, dy):
            made.append((dy * 1).reshape(2, 1).reshape(2))
            return made[-1]

    made, x = [], leaf(1.0, 2.0)
    h = times(x, x)
    plus(times(h, h), Reshaped.apply(h)).backward(np.ones(2))
    np.testing.assert_array_equal(made[0], [1 + 2, 1 + 2 * 4])
    np.testing.assert_array_equal(x.grad, made[0] * 2 * x.data)


def test_no_grad_records_and_saves_nothing():
    x = leaf(1.0)
    with no_grad():
        y = times(x, x)
    assert y.op is None and not y.requires_grad

    @no_grad()
    def f(x):
        with no_grad():
            pass
        return times(x, x)

    assert f(x).op is None
    assert times(x, x).op is not None


def test_no_grad_in_one_thread_leaves_the_others_alone():
    """Two threads inside one decorated function, which the first to come is the first to leave."""
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()
    recording = {}

    @no_grad()
    def f(mine: threading.Event, other: threading.Event) -> None:
        mine.set()
        other.wait(10)

    def first() -> None:
        f(first_is_in, second_is_in)
        recording["first"] = is_recording()
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(10)
        with no_grad():
            f(second_is_in, first_is_out)
            recording["second, inside"] = is_recording()
        recording["second"] = is_recording()

    workers = [threading.Thread(target=work) for work in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert recording == {"first": True, "second, inside": False, "second": True}


def test_needs_is_false_where_nothing_is_recorded():
    seen = []

    class Needs(Op):
        def forward(self, a, b):
            seen.append(list(self.needs))
            return a + b

        def backward(self, dy):
            return dy, None

    Needs.apply(leaf(1.0), Tensor([1.0]))
    with no_grad():
        Needs.apply(leaf(1.0), leaf(1.0))
    assert seen == [[True, False], [False, False]]


@pytest.mark.parametrize(
    "data, dtype",
    [
        ([1, 2], np.float32),
        (3, np.float32),
        (2.5, np.float32),
        (True, np.float32),
        (np.arange(3), np.float32),
        (np.ones(3), np.float64),
        (np.float64(3), np.float64),
        (np.ones((), np.float16), np.float16),
        (np.ones((0, 3), np.float32), np.float32),
        (np.ones((4, 6))[::2, ::-3], np.float64),
    ],
)
def test_floats_keep_their_type_and_the_rest_becomes_float32(data, dtype):
    x = Tensor(data)
    assert x.dtype == dtype and x.shape == np.shape(data)


@pytest.mark.parametrize("data", ["text", [1j], None, {}, np.array(["a"])])
def test_what_is_not_real_numbers_is_a_type_error(data):
    with pytest.raises(TypeError, match="Tensor holds real numbers, got"):
        Tensor(data)


def test_a_tensor_of_a_tensor_names_detach():
    with pytest.raises(TypeError, match="detach"):
        Tensor(Tensor([1.0]))


def test_backward_where_nothing_was_recorded():
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        Tensor([1.0]).backward()
    with no_grad():
        y = times(leaf(1.0), leaf(1.0))
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        y.backward()


def test_backward_after_the_graph_was_freed():
    x = leaf(1.0)
    y = times(x, x)
    y.backward()
    with pytest.raises(RuntimeError, match=r"already freed by an earlier backward\(\) \(at Times\)"):
        y.backward()


def test_backward_from_a_shared_part_that_was_freed():
    x = leaf(1.0)
    shared = times(x, x)
    plus(shared, x).backward()
    with pytest.raises(RuntimeError, match="already freed"):
        times(shared, x).backward()


def test_backward_needs_a_gradient_of_the_right_shape_and_type():
    y = times(leaf(1.0, 2.0), leaf(1.0, 2.0))
    with pytest.raises(ValueError, match=r"shape \(2,\) needs the gradient of its output"):
        y.backward()
    with pytest.raises(ValueError, match=r"dout has shape \(3,\), the tensor \(2,\)"):
        y.backward(np.ones(3))
    with pytest.raises(TypeError, match="dout must hold real numbers, got complex128"):
        y.backward(np.ones(2) * 1j)
    y.backward([1, 1])  # nothing above used the graph up


def test_a_leaf_is_its_own_graph():
    x = leaf(4.0)
    x.backward()
    assert x.grad == [1]


@pytest.mark.parametrize(
    "result, message",
    [
        ((np.ones(2),), "returned 1 gradients for 2 inputs"),
        ((np.ones(3), np.ones(2)), r"returned a gradient of shape \(3,\) for input 0 of shape \(2,\)"),
        ((np.ones(2), None), "returned None for input 1, which needs a gradient"),
    ],
)
def test_an_op_with_a_wrong_backward_is_named(result, message):
    class Broken(Op):
        def forward(self, a, b):
            return a + b

        def backward(self, dy):
            return result

    with pytest.raises(ValueError, match=f"Broken.backward {message}"):
        Broken.apply(leaf(1.0, 2.0), leaf(1.0, 2.0)).backward(np.ones(2))


def test_a_gradient_that_is_not_of_floats_is_named():
    class Broken(Op):
        def forward(self, a):
            return a * 1

        def backward(self, dy):
            return dy.astype(int)

    with pytest.raises(TypeError, match="Broken.backward returned a gradient of int64 for input 0 of float64"):
        Broken.apply(leaf(1.0)).backward()


def test_mixed_types_give_each_leaf_a_gradient_of_its_own_type():
    x, y = leaf(2.0, dtype=np.float32), leaf(3.0)
    times(x, y).backward()
    assert x.grad.dtype == np.float32 and y.grad.dtype == np.float64


def test_an_op_without_formulas_says_which_is_missing():
    class Half(Op):
        def forward(self, a):
            return a * 1

    with pytest.raises(TypeError, match="Half must define backward"):
        Half.apply(leaf(1.0)).backward()
    with pytest.raises(TypeError, match="Op must define forward"):
        Op.apply(leaf(1.0))


def test_repr_tells_value_type_and_origin():
    assert repr(Tensor([1.0, 2.0])) == "Tensor([1., 2.])"
    assert repr(leaf(1.0)) == "Tensor([1.], dtype=float64, requires_grad=True)"
    assert repr(times(leaf(1.0), leaf(1.0))) == "Tensor([1.], dtype=float64, op=Times)"
