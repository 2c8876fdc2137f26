"""On-policy distillation over the teacher's top-k ids (arXiv 2603.25562, local support matching).

python launch/train.py --config=configs/topk_opd.py

The divergence of student and teacher over a few ids at each visited prefix, instead of the one token
that was sampled. Other published forms, by `--config.loss....`:

    support=student form=stop_gradient                        2605.11182, "notail_sg", k = 20
    support=student form=tail                                 2605.11182, "full_vocab_topk", k = 20
    support=intersection form=renormalised                    2605.11182, "intersect_sg_norm", k = 20
    support=student pg_weight=1 advantage=support divergence_weight=0 form=raw    2604.13016, "top-k", k = 16
    support=full form=raw top_k=16                            the whole vocabulary, exact; top_k as by default

docs/objectives.md has every field, its equation, function and test.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(recipe: str | None = None) -> ConfigDict:
    """The divergence instead of the policy gradient."""
    config = recipes.recipe(recipe)
    config.loss.pg_weight = 0.0  # 2603.25562: "advantage off"
    config.loss.divergence_weight = 1.0  # 2603.25562
    config.loss.support = "teacher"  # 2603.25562
    config.loss.form = "renormalised"  # 2603.25562; raw sums collapse
    config.loss.aggregation = "token"  # 2603.25562
    if (recipe or "tiny").partition(",")[0] == "tiny":
        config.loss.top_k = 4  # of 308 ids, 8 of which hold 99.99 % of the mass
    else:
        config.loss.top_k = 32  # 2603.25562
        config.rollout.top_p = 0.9  # 2603.25562
    return config
