"""One family of each kind, and one of each trap, of the scorecard's sweep over all of them."""

import pytest

from tests.scorecard import families

FAMILIES = {
    "decoder llama": False,
    "decoder glm4_moe": True,  # PEFT takes its dense layers for experts
    "decoder laguna": True,  # PEFT renames what has its new name already
    "decoder qwen3_next": True,
    "encoder modernbert": False,
    "encoder-decoder bart": False,
    "vision resnet": False,  # batch statistics, and one linear layer
    "vision dinov2": False,
    "vision-language llava_onevision": False,
    "speech wav2vec2": False,
}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family(case):
    assert families.run(case) == {"unreadable": FAMILIES[case]}
