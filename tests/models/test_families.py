"""One family of each kind, and one of each trap, of the scorecard's sweep over all of them."""

import pytest

from tests.scorecard import families
from tests.support.marks import slow

FAMILIES = (
    "decoder llama",
    "decoder falcon",  # writes over outputs in place
    "decoder glm4_moe",  # PEFT would take its dense layers for experts
    "decoder laguna",  # PEFT would rename what has its new name already
    slow("decoder qwen3_next"),
    "encoder modernbert",
    "encoder-decoder bart",
    slow("vision resnet"),  # batch statistics, and one linear layer
    "vision dinov2",
    "vision-language llava_onevision",
    slow("speech wav2vec2"),
)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family(case):
    assert families.run(case) == {"unreadable": False}
