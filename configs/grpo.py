"""GRPO (arXiv 2402.03300): group-relative advantages of a reward that math-verify gives. No teacher.

python launch/train.py --config=configs/grpo.py

Dr.GRPO (2503.20783): --config.loss.group_normalise=False --config.loss.aggregation=constant
Together with a teacher: --config.loss.teacher_coef=1 --config.teacher.path=DIR
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str | None = None) -> ConfigDict:
    """The advantage is the group's, not the teacher's; eight rollouts a prompt."""
    config = recipes.recipe(recipe)
    name, *options = (recipe or "tiny").split(",")
    config.loss.teacher_coef = 0.0
    config.loss.group_coef = 1.0
    config.rollout.samples_per_prompt = 8  # LUFFY's on-policy RL, the paper's GRPO row: n = 8
    config.eval.teacher = False
    if not any(option.startswith("teacher=") for option in options):
        config.teacher.path = ""
        config.data.teacher_prompt_template = config.data.teacher_system_prompt = "same"
    if name == "tiny":
        config.rollout.prompts_per_step = 8  # as many rollouts a step as the other methods
    elif name != "smollm2-135m":
        config.rollout.prompts_per_step = 128  # LUFFY: batch 128
        config.rollout.slots = 512  # of 1,024 rollouts: what 4 x H200 hold beside a 7B model
    return config
