"""evaluate_model: which of the held-out stories are scored."""
import pytest
import torch

from decoding import reveal
from model.masks import Layout
from report import compare, metrics

EOT = 10


class Letters:
    """Decodes ids to letters."""
    eot = EOT

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def pieces(self, ids):
        return [self.decode([i]) for i in ids]


@pytest.mark.parametrize("block, num_scored", [(32, 70), (33, 64)])
def test_a_model_of_long_blocks_is_scored_on_the_first_64_stories(tiny, block, num_scored):
    """Text is generated after all of them nevertheless."""
    net = tiny(layers=1, context=34).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    inner = torch.randint(0, EOT, (70, 8), generator=generator)
    held_out = list(torch.nn.functional.pad(inner, (1, 1), value=EOT))
    layout = Layout(block, 1, 1)
    checked = []
    numbers, _ = compare.evaluate_model(net, net, layout, reveal.parse("leftmost:0"), held_out, Letters(),
                                        length=34, seed=0, check=checked.append)
    scored = metrics.likelihood(net, held_out[:num_scored], layout, Letters())
    assert numbers["val_nats"] == pytest.approx(scored["val_nats"], rel=1e-9)
    fewer = metrics.likelihood(net, held_out[:num_scored - 1], layout, Letters())
    assert numbers["val_nats"] != pytest.approx(fewer["val_nats"], rel=1e-6)
    assert checked                                               # the stories that end; all of them are valid
    assert numbers["valid"] == pytest.approx(len(checked) / 70)
