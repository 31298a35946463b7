"""Which tests compile an operator of DeepSpeed's."""

import os

import pytest

COMPILES_AN_OPERATOR = pytest.mark.skipif(
    "MEGATRON_LITE_TEST_OPERATORS" not in os.environ,
    reason="compiles an operator of DeepSpeed's for minutes: run with MEGATRON_LITE_TEST_OPERATORS=1",
)
"""Mark of such a test. What an earlier compilation left is no reason to run it: for another installation of
torch it is compiled anew, and a compilation that was killed leaves a lock for which the next one waits."""
