"""Several encoders side by side."""

import pytest
import torch

from triptych.errors import UserError
from triptych.evals.ensemble import concatenated
from triptych.evals.knn import knn


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_encoder_is_put_to_unit_length_and_stands_beside_the_others():
    features = [draw(4, 3), 100 * draw(4, 5, seed=1), draw(4, 2, seed=2).half()]
    found = concatenated(features)
    assert found.shape == (4, 10)
    assert found.dtype == torch.float32
    for i in range(4):
        expected = []
        for x in features:
            length = sum(float(v) ** 2 for v in x[i]) ** 0.5
            expected += [float(v) / length for v in x[i]]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-6)


def test_their_cosine_is_the_mean_of_the_encoders_cosines():
    features = [draw(6, 3), 100 * draw(6, 50, seed=1)]
    together = torch.nn.functional.normalize(concatenated(features))
    mean = sum(torch.nn.functional.cosine_similarity(x[:, None], x[None], -1) for x in features) / 2
    torch.testing.assert_close(together @ together.T, mean, rtol=0, atol=1e-6)


def test_one_encoder_alone_has_the_neighbours_it_has_anyway():
    x, y, labels = draw(40, 5), draw(9, 5, seed=1), torch.arange(40) % 3
    alone = knn(x, labels, y, labels[:9], k=[5])
    assert knn(concatenated([x]), labels, concatenated([y]), labels[:9], k=[5]) == alone


@pytest.mark.parametrize("features", [[], [torch.ones(3)], [torch.ones(3, 2), torch.ones(4, 2)]])
def test_features_of_unlike_images_are_refused(features):
    with pytest.raises(UserError, match="same images"):
        concatenated(features)
