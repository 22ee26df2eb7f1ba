"""What blocked attention holds beyond its inputs and outputs."""

import subprocess
import sys
import textwrap

# The process itself is measured, in a fresh one: the allocator of this one has seen other tests.
PROGRAM = """
    import resource, torch, vicinal

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    q, k, v = (torch.randn(1, 64, 64, 64, 4, 32, requires_grad=True) for _ in range(3))
    small = [t[:, :8, :8, :8].detach().requires_grad_() for t in (q, k, v)]
    vicinal.neighborhood_attention(*small, 7).sum().backward()  # whatever is loaded once
    before = peak()
    out = vicinal.neighborhood_attention(q, k, v, 7)
    torch.autograd.grad(out.sum(), (q, k, v))
    print(peak() - before, 7 * q.numel() * q.element_size())
"""


def test_forward_and_backward_of_a_large_volume_stay_under_two_gigabytes():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, check=True)
    extra, _needed = map(int, done.stdout.split())
    # Out, its gradient and the three gradients alone are 0.7 GB of it.
    assert extra < 2e9
