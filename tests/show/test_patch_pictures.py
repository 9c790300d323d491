"""Principal components, clusters, similarity and correspondence of patch tokens, against plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA as SklearnPCA

from conftest import tiny_encoder
from triptych.errors import UserError
from triptych.show.neighbours import nearest_images
from triptych.show.patches import PCA, Clusters, correspondences, patch_clusters, patch_pca, similarity_map
from triptych.tokens import TokenSpec

IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return tiny_encoder(TokenSpec()).eval().requires_grad_(False)


def test_components_are_those_of_principal_component_analysis():
    x = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 4, 3, 1, 1, 1, 1])
    ours, theirs = PCA.of(x), SklearnPCA(3, svd_solver="full").fit(x.double().numpy())
    for k in range(3):
        a, b = ours.directions[:, k].numpy(), theirs.components_[k]
        np.testing.assert_allclose(a, b * np.sign(a @ b), atol=1e-6)
        assert a[np.abs(a).argmax()] > 0
    y = ours(x)
    assert float(y.min()) == 0
    assert float(y.max()) == 1
    for k in range(3):  # 2 % of the tokens lie at or beyond each end
        assert int((y[:, k] == 0).sum()) == int((y[:, k] == 1).sum()) == 4


def test_equal_patches_of_two_images_have_equal_colours(encoder):
    twice = torch.cat([IMAGES[:1], IMAGES[:1]])
    a, b = patch_pca(encoder, twice)
    assert torch.equal(a, b)
    assert a.shape == (4, 6, 3)
    assert patch_pca(encoder, IMAGES).std() > 0.1


def test_tokens_of_one_value_and_of_two_dimensions_have_components_too():
    assert torch.equal(PCA.of(torch.ones(5, 4))(torch.ones(5, 4)), torch.zeros(5, 3))
    assert PCA.of(torch.randn(9, 2))(torch.randn(9, 2))[:, 2].eq(0).all()


def test_clusters_are_found_where_there_are_some_and_the_largest_is_first():
    torch.manual_seed(0)
    sizes, ends = (5, 20, 10), torch.eye(3, 6) * 4
    x = torch.cat([end + 0.1 * torch.randn(n, 6) for n, end in zip(sizes, ends, strict=True)])
    found = Clusters.of(x, 3)(x)
    assert found.tolist() == [2] * 5 + [0] * 20 + [1] * 10


def test_a_token_belongs_to_the_nearest_centre(encoder):
    x = encoder(IMAGES).patch[0]
    for normalise in (True, False):
        clusters = Clusters.of(x, 4, normalise=normalise)
        for token, label in zip(F.normalize(x, dim=1) if normalise else x, clusters(x), strict=True):
            distances = [float(((token - torch.from_numpy(c)) ** 2).sum()) for c in clusters.centres]
            assert label == int(np.argmin(distances))


def test_each_image_has_its_own_clusters_and_a_seed_gives_the_same_ones(encoder):
    both, again = patch_clusters(encoder, IMAGES, 3), patch_clusters(encoder, IMAGES, 3)
    assert both.shape == (2, 4, 6)
    assert (both == again).all()
    for i in range(2):
        assert (both[i] == patch_clusters(encoder, IMAGES[i : i + 1], 3)[0]).all()
        counts = np.bincount(both[i].ravel(), minlength=3)
        assert (np.diff(counts) <= 0).all()


def test_length_counts_unless_tokens_are_normalised():
    x = torch.tensor([[1.0, 0], [1.1, 0], [9, 0], [9.1, 0], [0, 1], [0, 1.1]])
    assert Clusters.of(x, 2)(x).tolist() == [0, 0, 0, 0, 1, 1]
    assert Clusters.of(x, 2, normalise=False)(x).tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(("k", "restarts"), [(0, 1), (25, 1), (2, 0)])
def test_impossible_numbers_of_clusters_are_refused(encoder, k, restarts):
    with pytest.raises(UserError, match="at most 24"):
        patch_clusters(encoder, IMAGES, k, restarts=restarts)


def test_a_click_gives_the_cosine_with_every_patch(encoder):
    found, patch = similarity_map(encoder, IMAGES, (1, 2)), encoder(IMAGES).patch
    for i in range(2):
        query = patch[i, 1 * 6 + 2]
        for r in range(4):
            for c in range(6):
                x = patch[i, r * 6 + c]
                expected = (x @ query / (x.norm() * query.norm())).item()
                assert found[i, r, c].item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found[:, 1, 2], torch.ones(2))


def test_correspondences_are_each_others_nearest_patches(encoder):
    first, second = IMAGES[0], IMAGES[1, :, :, :16]
    found = correspondences(encoder, first, second, top=1000)
    a, b = (F.normalize(encoder(x[None]).patch[0], dim=1) for x in (first, second))
    expected = []
    for i in range(24):
        for j in range(16):
            s = [float(a[i] @ y) for y in b], [float(x @ b[j]) for x in a]
            if max(s[0]) == s[0][j] and max(s[1]) == s[1][i]:
                expected.append((s[0][j], (i // 6, i % 6), (j // 4, j % 4)))
    expected.sort(reverse=True)
    assert found.mutual == len(expected) > 1
    pairs = [tuple(map(tuple, p)) for p in zip(found.first.tolist(), found.second.tolist(), strict=True)]
    assert sorted(pairs) == sorted((x, y) for _, x, y in expected)
    np.testing.assert_allclose(found.similarity.tolist(), [s for s, _, _ in expected], atol=1e-6)
    assert len(correspondences(encoder, first, second, top=2).similarity) == 2


def test_an_image_corresponds_to_itself_patch_by_patch(encoder):
    found = correspondences(encoder, IMAGES[0], IMAGES[0], top=1000)
    assert found.mutual == 24
    assert torch.equal(found.first, found.second)


def test_the_nearest_images_are_those_of_largest_cosine():
    g = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(30, 5, generator=g), torch.randn(4, 5, generator=g)
    found = nearest_images(gallery, queries, 3)
    for query, indices, cosines in zip(queries, found.indices, found.cosine, strict=True):
        s = sorted(((F.cosine_similarity(query, x, dim=0).item(), i) for i, x in enumerate(gallery)), reverse=True)
        assert indices.tolist() == [i for _, i in s[:3]]
        np.testing.assert_allclose(cosines.tolist(), [c for c, _ in s[:3]], atol=1e-6)
    for k in (0, 31):
        with pytest.raises(UserError, match="30 images"):
            nearest_images(gallery, queries, k)
