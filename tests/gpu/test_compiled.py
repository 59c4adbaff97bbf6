"""`torch.compile(fullgraph=True)` on a CUDA device, where caches replay graphs by default."""

import pytest
import torch

import kvfold
from tests.integrations.catalogue import folded
from tests.integrations.conftest import tiny_llama

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_tokens_are_the_eager_ones(mode):
    torch._dynamo.reset()
    model, fast = (tiny_llama().cuda() for _ in range(2))
    prompt = torch.randint(3, 300, (2, 230), generator=torch.Generator().manual_seed(12)).cuda()
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0

    def generated(model, cache):
        with torch.no_grad():
            return model.generate(
                prompt,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=40,
                do_sample=False,
            )

    wanted = generated(model, folded(model, "kivi4-g64"))
    fast.forward = torch.compile(fast.forward, fullgraph=True, mode=mode)
    with kvfold.fused(fast):
        cache = folded(fast, "kivi4-g64")
        assert torch.equal(generated(fast, cache), wanted)
    assert "is compiled" in cache.graphs.reason
    assert cache.graphs.captures == 0
