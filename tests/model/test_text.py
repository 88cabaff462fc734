"""What the decoder compiles computes the same for every shape, whatever was computed before."""

import subprocess
import sys

CODE = """if True:
    import mlx_smolvlm
    import mlx.core as mx
    import numpy as np
    from mlx_smolvlm.model.text import RMSNorm, rotate_rows, rotate_step, swiglu
    from mlx_smolvlm.model.vision import gelu_tanh

    def compute_all(width, length):
        key = mx.random.key(0)
        x = mx.random.normal((2, length, width), key=key)
        norm = RMSNorm(width, 1e-5)
        qkv = mx.random.normal((2, 1, 3, width), key=key)
        positions = mx.array([4, 4, 0] * 2)
        got = norm(x), swiglu(x, x), gelu_tanh(x), rotate_step(qkv, positions, 1e4)
        exact = x * mx.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)))
        expected = (
            mx.fast.rms_norm(x, norm.weight, 1e-5),
            x * mx.sigmoid(x) * x,
            exact,
            rotate_rows(qkv, positions, 1e4),
        )
        return got, expected

    def compute_loss(v):  # the inputs of the functions do not depend on v
        return sum((one * v).sum() for one in compute_all(64, LENGTH)[0])

    mx.eval(mx.grad(compute_loss)(mx.ones(64)))
    for width, length in ((64, LENGTH), (96, LENGTH), (32, 1), (96, 1), (32, 7)):
        for got, expected in zip(*compute_all(width, length), strict=True):
            difference = np.abs(np.array(got) - np.array(expected)).max()
            assert difference < 1e-5, (width, length, difference)
"""


def test_a_first_call_inside_of_a_gradient_spoils_no_later_one() -> None:
    for length in (1, 5):  # a new process, in which nothing was computed before
        command = [sys.executable, "-c", CODE.replace("LENGTH", str(length))]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert (ran.returncode, ran.stderr) == (0, "")
