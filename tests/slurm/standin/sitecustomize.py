"""In jobs of these tests: `experiments.launch.pool` is the stand-in beside this file."""

import sys

import standin_pool

sys.modules["experiments.launch.pool"] = standin_pool
