"""The table of all config fields: name, default, allowed values and meaning, in the order of the data flow.

Everything that is known of a field alone stands here and nowhere else; the section of the loss is in
loss_fields.py, rules of single fields in rules.py, rules between fields in validate.py. The trees (trees.py),
the checks (schema.py), `--fields` of the entry points and docs/config.md come from this table. Where a
package implements the choices, the record names its list. What published values rest on is quoted in
configs/recipes.py and configs/methods.py.
"""

# fmt: off

from ml_collections import ConfigDict

from opd_jax.config import guard_limits
from opd_jax.config.harness_fields import HARNESS
from opd_jax.config.loss_fields import LOSS
from opd_jax.config.record import (
    ABOVE_ZERO,
    COUNT,
    FROM_ZERO,
    SHARE,
    Choices,
    Field,
    Range,
    Section,
    Several,
    by_name,
    make_config,
)
from opd_jax.config.rules import (
    DAY,
    DEPTHS,
    FUNCTION,
    PATTERN,
    POSITIONS,
    TEMPLATE,
    TEXTS,
    TRAINED_MODEL,
    TRAINING_FILE,
    WORDS,
)
from opd_jax.config.teacher_fields import TEACHERS

# Metrics by which a best checkpoint is kept; True where more is better.
BEST = {
    "accuracy": True, "matched": True, "truncation_rate": False, "repetition_rate": False,
    "unparsed": False, "length_mean": False,
}

NUCLEUS = Range(above=0, high=1)
SWITCH = Choices(("replicated", "sharded"))


def _model(role: str, path: Field, meaning: str, *more: Field) -> Section:
    return Section(role, meaning, (
        path,
        Field("dtype", "auto", Choices(("auto", "float32", "bfloat16")),
              "Dtype that the model computes in. auto is bfloat16 on a GPU and float32 on a CPU."),
        Field("rope_theta", 0.0, FROM_ZERO, "Base of the rotary positions; 0 = that of its config.json."),
        Field("max_position", 0, FROM_ZERO, "Longest row that the model reads; 0 = that of its config.json."),
        Field("chat_template", "", None, "Jinja file with a chat template; empty = the tokenizer's own."),
        Field("enable_thinking", True, None, "Value passed to chat templates that know this switch (Qwen3)."),
        *more,
    ))


SECTIONS = (
    Section("", "The run as a whole.", (
        Field("seed", 0, Range(0, below=2**32), "Seed of the data order, of rollouts and of evaluations."),
        Field("steps", 100, COUNT, "Batches of rollouts to train on."),
    )),
    _model("student", Field("path", "", TRAINED_MODEL, "Hugging Face folder or hub name."),
           "The model that is trained."),
    _model("teacher", Field("path", "", None, "Hugging Face folder or hub name; `student` = the student "
                            "itself, shown a prompt of its own."),
           "The model that teaches.",
           Field("follow", "frozen", Choices(("frozen", "average", "live", "every")),
                 "Weights of a teacher that is the student: those of step 0 (frozen), their moving "
                 "average, the student's own at every step (live), or a copy made now and then (every)."),
           Field("decay", 0.99, SHARE, "Decay of that moving average, per update."),
           Field("every", 10, COUNT, "Updates of the optimizer between two such copies.")),
    TEACHERS,
    _model("reference", Field("path", "", None,
                              "Hugging Face folder or hub name; empty = the student at step 0."),
           "The model that KL(student || reference) is measured against."),
    Section("data", "Problems, and how the models are shown them (docs/data.md).", (
        Field("train", "tiny:train", TRAINING_FILE,
              "Problems to train on: a file, or tiny:SPLIT, the generated data set."),
        Field("columns.problem", "", None,
              "Column of the problem, a dotted path into a row; empty = found by "
              "the names that people use. So are the next three."),
        Field("columns.solution", "", None, "Column of the golden solution."),
        Field("columns.answer", "", None, "Column of the final answer."),
        Field("columns.id", "", None, "Column of the problem's name."),
        Field("bad_rows", "refuse", Choices("opd_jax.data.dataset:BAD_ROWS"),
              "What is done about a row that cannot be used: refuse the file, or skip the row and count it."),
        Field("prompt_template", "{problem}", TEMPLATE,
              "The user's turn. {problem}, {answer}, {solution} and any {column} of the row are filled in."),
        Field("system_prompt", "", None,
              "The system's turn; empty = the row's own, if any; none = no such turn."),
        Field("teacher_prompt_template", "same", TEMPLATE,
              "The user's turn that the teacher is shown; same = the student's."),
        Field("teacher_system_prompt", "same", None,
              "The system's turn that the teacher is shown; same = the student's."),
        Field("date", "", DAY,
              "Day that chat templates print; empty = the day on which the workdir is made."),
        Field("shuffle", True, None, "Whether problems are put into an order drawn from the seed."),
        Field("epochs", 0.0, FROM_ZERO, "Passes over the data that set `steps`; 0 = `steps` counts."),
        Field("size", 20_000, COUNT, "Problems of the generated data set before it repeats."),
    )),
    HARNESS,
    Section("rollout", "Responses that the student samples in training.", (
        Field("prompts_per_step", 16, COUNT, "Prompts of one step."),
        Field("samples_per_prompt", 4, COUNT, "Responses to each prompt."),
        Field("max_prompt_tokens", 64, COUNT, "Longest prompt of the student, in tokens."),
        Field("max_response_tokens", 192, COUNT, "Longest response, in tokens."),
        Field("temperature", 1.0, FROM_ZERO, "Temperature at which rollouts are sampled; they are scored at "
              "scoring.temperature."),
        Field("top_p", 1.0, NUCLEUS, "Probability mass of the likeliest ids that are sampled among."),
        Field("top_k", 0, FROM_ZERO, "Number of likeliest ids that are sampled among; 0 = all."),
        Field("slots", 0, FROM_ZERO, "Sequences decoded at one time; 0 = all of a step."),
        Field("stop_on_repetition", 0, FROM_ZERO,
              "A row ends when its last so many tokens repeat with a short "
              "period; 0 = never, as in the papers."),
        Field("repetition_period", 16, COUNT, "Longest such period, in tokens."),
        Field("horizon", (), POSITIONS,
              "Response budgets, in tokens, before max_response_tokens, which is the last one: the horizon "
              "rises from one to the next (docs/horizon.md). Empty = max_response_tokens at every step."),
        Field("horizon_steps", 25, COUNT, "Steps of each of these budgets, or between two checks."),
        Field("horizon_entropy", 0.0, FROM_ZERO,
              "Least mean entropy of the student's tokens since the last check, in nats, at which the "
              "horizon rises (2605.16826); 0 = it rises in any case."),
    )),
    Section("scoring", "Log-probs of the models on rollouts.", (
        Field("token_chunk", 2048, COUNT, "Tokens whose logits exist at one time while scoring."),
        Field("temperature", 1.0, ABOVE_ZERO, "Logits of all models are divided by this before log-probs are "
              "taken, in advantage, ratio, KL and divergence alike (docs/objectives.md)."),
        Field("overlap_top_k", 16, COUNT, "k of the overlap metrics (2604.13016 uses 16)."),
        Field("compare", "auto", Choices("opd_jax.data.vocabulary:COMPARISONS"),
              "How log-probs of student and teacher are compared: by ids, or by spans of text where their "
              "tokenizers differ (docs/spans.md); auto = by ids where both read every ordinary id alike."),
        Field("span_room", 1.5, Range(0.5),
              "Tokens of a response that the teacher reads where spans are compared, as a multiple of "
              "rollout.max_response_tokens; the rest is not compared."),
        Field("special_tokens", "remap", Choices("opd_jax.data.vocabulary:SPECIAL_TOKENS"),
              "What is done with special ids that mean one thing to the student and another to the teacher "
              "(docs/models.md)."),
        Field("mask_first", (), TEXTS,
              "Texts whose first occurrence in a response is left out of the loss (2603.25562)."),
    )),
    LOSS,
    Section("optim", "The optimizer, AdamW, and the memory of an update.", (
        Field("learning_rate", 1e-6, ABOVE_ZERO, "Peak learning rate."),
        Field("schedule", "constant", Choices(("constant", "linear", "cosine")),
              "Learning rate after the warm-up; linear and cosine end at 0 at `steps`."),
        Field("warmup_steps", 0, FROM_ZERO,
              "Optimizer steps of the warm-up; a batch of rollouts has updates_per_rollout of them."),
        Field("warmup_fraction", 0.0, SHARE, "The warm-up as a share of `steps`, where warmup_steps is 0."),
        Field("beta1", 0.9, Range(0, below=1), "Decay of Adam's first moment."),
        Field("beta2", 0.999, Range(0, below=1), "Decay of Adam's second moment."),
        Field("weight_decay", 0.0, FROM_ZERO, "Decoupled weight decay."),
        Field("grad_clip", 1.0, ABOVE_ZERO, "Largest global norm of the gradient."),
        Field("token_chunk", 2048, COUNT, "Tokens whose logits exist at one time in the update."),
        Field("microbatch_tokens", 16_384, COUNT,
              "Tokens that go through the models of a replica at one time."),
        Field("updates_per_rollout", 1, COUNT, "Optimizer steps that a batch of rollouts is split into."),
        Field("remat", "none", Choices("opd_jax.models.remat:POLICIES"),
              "What a layer recomputes in the backward pass: nothing (none), all but what fused attention "
              "returned (attention), all but that and its matrix products (dots), or everything (full)."),
    )),
    Section("jump", "Jumps along the direction of training, tried on problems (docs/horizon.md).", (
        Field("problems", 0, FROM_ZERO,
              "Training problems that are held out to try jumps on at the steps 1, 2, 4, 8, ...; 0 = no "
              "jumps (2605.11739 has 50)."),
        Field("candidates", 5, COUNT,
              "Largest k of the weights W + 2 k (W - the weights at the last jump) that are tried."),
    )),
    Section("mesh", "Devices (docs/multi_gpu.md).", (
        Field("data", -1, Range(1, also=(-1,)),
              "Rows are divided over data x fsdp devices; -1 = as many as there are devices for."),
        Field("fsdp", 1, COUNT, "Devices that hold slices of the sharded models."),
        Field("tensor", 1, COUNT, "Devices that share heads and MLP of every layer."),
        *(Field(role, "replicated", SWITCH,
                f"Compute weights of the {role}: whole on every device, or a slice on each device of fsdp.")
          for role in ("student", "teacher", "reference")),
        Field("allocator", "default", Choices("opd_jax.hardware:ALLOCATORS"),
              "What gives a GPU's memory to arrays: JAX's own choice (default), a pool (bfc), CUDA's pool "
              "(cuda_async), pages that need not be neighbours (vmm), or no pool (platform, address)."),
        Field("attention", "auto", Choices("opd_jax.models.attention:KINDS"),
              "What computes attention: cuDNN in 16 bits on a GPU (auto), or JAX alone (plain), which takes "
              "more time and memory and does without cuDNN."),
    )),
    Section("processes", "Several processes of one run (docs/multi_gpu.md).", (
        Field("connect_seconds", 300.0, ABOVE_ZERO, "Time limit for all processes to connect at the start."),
        Field("heartbeat_seconds", 100, COUNT,
              "A process that sends no heartbeat for so long is lost, and the others end."),
        Field("share_programs", False, None,
              "Whether, on GPUs, process 0 compiles programs of several processes and sends them to the "
              "others, so that all run the same kernels."),
    )),
    Section("watchdog", "Phases of a run that take far too long (docs/reliability.md).", (
        Field("action", "report", Choices(("off", "report", "end")),
              "What is done about a late phase: report prints it with the stacks of all threads, end also "
              "ends the process with status 75."),
        Field("factor", 10.0, Range(above=1),
              "A phase (a step, an evaluation, a checkpoint) is late after this multiple of the median "
              "duration of its kind."),
        Field("seconds", 600.0, ABOVE_ZERO, "A phase is never late before so many seconds."),
        Field("first_seconds", 3600.0, ABOVE_ZERO,
              "The first two phases of a kind, which may compile, are late after so many seconds."),
    )),
    Section("guard", "Collapse (docs/guard.md) and numbers that are not finite (docs/reliability.md).", (
        Field("action", "off", Choices(guard_limits.ACTIONS),
              "What is done about a collapse: warn logs it, stop saves and ends, strengthen raises "
              "beta_kl and lambda_gold, mask leaves repetitive tails out of the loss, rollback goes "
              "back to the checkpoint before it and goes on strengthened."),
        Field("false_alarm_every", 1000, Range(10),
              "Steps in which chance alone may raise one signal once."),
        Field("memory", 50, Range(2 * guard_limits.LAG), "Steps of the running mean that counts as healthy."),
        Field("patience", 20, Range(guard_limits.LAG),
              "Healthy steps that end an alarm, or take back one strengthening."),
        Field("factor", 2.0, Range(1.1), "Factor by which an alarm multiplies beta_kl and lambda_gold."),
        Field("beta_kl_floor", 0.01, FROM_ZERO, "First raised value where loss.beta_kl is 0."),
        Field("beta_kl_max", 1.0, FROM_ZERO, "Largest raised value; 0 = never raised."),
        Field("lambda_gold_floor", 0.1, FROM_ZERO, "First raised value where loss.lambda_gold is 0."),
        Field("lambda_gold_max", 2.0, FROM_ZERO,
              "Largest raised value; 0 = never raised. Otherwise data.train needs golden solutions."),
        Field("max_rollbacks", 3, COUNT, "Rollbacks after which the run stops."),
        Field("skip_nonfinite", 0, FROM_ZERO,
              "Updates with a loss, a gradient or a log-prob that is not finite that may be left out before "
              "the run stops."),
        Field("spike", 0.0, Range(above=1, also=(0,)),
              "A gradient norm above this multiple of its running geometric mean is a spike; 0 = off."),
        Field("spike_action", "warn", Choices(("warn", "skip")),
              "What is done about a spike: log it, or leave the update out."),
        Field("copies", 0, FROM_ZERO,
              "Steps between checks that replicated weights agree across devices; 0 = never."),
        Field("self_test", "gpu", Choices(("off", "gpu", "always")),
              "When a start compares sampler and scorer on a few tokens: never, on GPUs, or on any device."),
    )),
    Section("eval", "Answers to held-out problems and to benchmarks (docs/evaluation.md).", (
        Field("every", 0, FROM_ZERO, "Steps between evaluations in training; 0 = only before and after."),
        Field("data", "tiny:test", None, "Held-out problems, named as in data.train; empty = none."),
        Field("problems", 200, FROM_ZERO, "The first so many problems are measured; 0 = all."),
        Field("samples", 1, FROM_ZERO,
              "Answers to each problem (k of avg@k); 0 = the benchmark's own number, 1 where it has none."),
        Field("temperature", 0.6, FROM_ZERO, "Temperature at which answers are sampled."),
        Field("top_p", 1.0, NUCLEUS, "Probability mass of the likeliest ids that are sampled among."),
        Field("top_k", 0, FROM_ZERO, "Number of likeliest ids that are sampled among; 0 = all."),
        Field("teacher", True, None, "Whether the teacher is measured too, for the closing table."),
        Field("match", "", PATTERN,
              "Regular expression; the share of answers in which it is found is reported as `matched`."),
        Field("fallbacks", (), Several("opd_jax.grading.extract:FALLBACKS"),
              "Where an answer without a box is looked for, in this order."),
        Field("max_response_tokens", 0, FROM_ZERO,
              "Longest answer, in tokens; 0 = rollout.max_response_tokens."),
        Field("slots", 0, FROM_ZERO,
              "Sequences decoded at one time. 0 = automatic: next to a training run rollout.slots or "
              "256, for a model alone as many as fit its memory, at most 256 on each replica."),
        Field("best", "", Choices(("", *BEST)), "Metric by which best/ keeps a checkpoint; empty = none."),
    )),
    Section("grading", "Who decides whether an answer is right, for rewards and evaluations.", (
        Field("grader", "guarded", Choices("opd_jax.grading.extract:GRADERS"),
              "guarded is math-verify under the rules of docs/evaluation.md, math_verify its bare verdict."),
        Field("processes", 0, FROM_ZERO,
              "Grading processes; 0 = one per core that the run may use, at most 8."),
        Field("seconds", 5.0, Range(0.1, 30),
              "Processor time that an answer may take; beyond it the grade is TIMEOUT."),
    )),
    Section("reward", "Rewards of rollouts from a function or a column, in place of the verdict of `grading` "
            "(docs/rewards.md).", (
        Field("function", "", FUNCTION,
              "module:function that returns the rewards of a problem's rollouts; empty = the verdict."),
        Field("column", "", None,
              "Column of the data with the reward of every rollout of its problem; empty = none."),
        Field("seconds", 60.0, Range(0.1, 86_400),
              "Time that the function may take for one problem; then its process is replaced."),
        Field("processes", 1, COUNT, "Processes that call the function."),
        Field("on_error", "stop", Choices("opd_jax.grading.rewards:ON_ERROR"),
              "What is done where the function fails for a problem: save and end (stop), or leave its "
              "rollouts out of the reward, count them and go on (leave_out)."),
    )),
    Section("replay", "Recorded rollouts in place of sampled ones (docs/replay.md).", (
        Field("path", "", None, "Folder that launch/record.py has written; empty = rollouts are sampled."),
        Field("other_student", False, None,
              "Whether the student may be another one than the recorded: then training is off-policy from "
              "the first step on."),
    )),
    Section("metrics", "What is measured on responses (docs/metrics.md).", (
        Field("repetition_tail", 10_000, COUNT,
              "Characters of a text's tail that are compressed (2604.08527)."),
        Field("repetition_threshold", 10.0, ABOVE_ZERO,
              "Compression ratio above which a text repeats itself (2604.08527)."),
        Field("repetition_level", 6, Range(1, 9),
              "Level of zlib; 2604.08527 calls it fixed and does not give it."),
        Field("repeated_tokens", "tail", Choices("opd_jax.metrics.repetition:RULES"),
              "Which tokens repeat: the tails that RepRate flags (2604.08527), or n-grams (2605.11182)."),
        Field("repeated_ngram", 3, Range(2),
              "n of ngram: a token repeats if it completes an n-gram seen before."),
        Field("positions", (256, 512, 1024, 2048, 4096, 8192), POSITIONS,
              "score/* is also logged for the first so many tokens of responses."),
        Field("hedging", ("wait", "but", "maybe"), WORDS,
              "Words that are counted (2605.11182; its code counts step, first, second, third, but, "
              "wait, let)."),
    )),
    Section("checkpoint", "Checkpoints and orderly ends (docs/reliability.md).", (
        Field("every", 50, FROM_ZERO, "Steps between checkpoints; 0 = only at the end."),
        Field("keep", 2, COUNT,
              "How many of these are kept. One that an early end made stays until a newer one "
              "is complete."),
        Field("grace_seconds", 300.0, ABOVE_ZERO,
              "Time after SIGTERM or SIGINT for the step in hand and for saving."),
        Field("deadline_minutes", 0.0, FROM_ZERO,
              "Minutes after its start by which a run has saved and ended; 0 = no deadline."),
    )),
    Section("log", "Logs (docs/metrics.md, docs/report.md).", (
        Field("every", 1, COUNT, "Steps between lines of metrics.jsonl."),
        Field("rollouts", 1, FROM_ZERO, "Rollouts that a logged step writes to rollouts.jsonl."),
        Field("gradients", 50, FROM_ZERO,
              "Steps between measurements of each term's own gradient; 0 = never."),
        Field("variants", 0, FROM_ZERO,
              "Steps between comparisons of the update with that of every other advantage shape and "
              "token weight; 0 = never."),
        Field("tensorboard", False, None, "Whether metrics.jsonl also goes to tensorboard/."),
        Field("wandb", "", None,
              "Project of Weights & Biases that gets the same lines, offline unless WANDB_MODE "
              "names another mode; empty = none."),
    )),
    Section("profile", "Traces of a few steps (docs/profiling.md).", (
        Field("start_step", 3, COUNT, "First step that is traced: earlier ones compile."),
        Field("steps", 0, FROM_ZERO, "Steps that are traced, into the workdir's profile/; 0 = none."),
    )),
    Section("sample", "Solutions that the teacher writes for a cold start (docs/cold_start.md).", (
        Field("problems", 0, FROM_ZERO, "The first so many problems of data.train are sampled; 0 = all."),
        Field("samples", 1, COUNT, "Solutions to each problem."),
        Field("batch", 64, COUNT, "Problems sampled, graded and written at one time."),
        Field("slots", 0, FROM_ZERO, "Sequences decoded at one time; 0 = all of a batch."),
        Field("temperature", 0.7, FROM_ZERO, 'Temperature (2604.13016, C.1: "temperature 0.7, top-p=0.95").'),
        Field("top_p", 0.95, NUCLEUS, "Probability mass of the likeliest ids that are sampled among."),
        Field("top_k", 0, FROM_ZERO, "Number of likeliest ids that are sampled among; 0 = all."),
        Field("max_response_tokens", 0, FROM_ZERO,
              "Longest solution, in tokens; 0 = rollout.max_response_tokens."),
        Field("choose", "all", Choices(("all", "overlap", "likelihood")),
              "Solutions that stay of several to a problem: all, or one, a correct one first: that whose "
              "tokens overlap most with the student's likeliest (2605.09725), or the one that is likeliest "
              "to the student."),
        Field("choose_top_k", 16, COUNT, "overlap: the student's ids at a position (2605.09725: 16)."),
        Field("hint", "", None,
              "Template with {answer} of one more prompt, where no solution is correct; empty = none."),
        Field("keep_wrong", False, None,
              "Whether solutions stay whose answer is wrong or cannot be read."),
        Field("keep_repetitive", False, None, "Whether solutions stay that metrics.repetition_* flag."),
    )),
    Section("probe", "Questions to a pair of models (docs/probes.md).", (
        Field("problems", 64, COUNT, "The first so many problems of data.train that training would see."),
        Field("batch", 64, COUNT, "Responses sampled at one time, between two lines of progress."),
        Field("depths", (), DEPTHS,
              "Tokens of the student's prefixes; empty = 1/8, 1/4 and 1/2 of rollout.max_response_tokens."),
    )),
)
# These share the section `eval` with the fields of training that launch/evaluate.py reads as well.
BENCHMARKS = Section("eval", "Benchmarks, for launch/evaluate.py (docs/evaluation.md).", (
    Field("benchmarks", "", None, "Benchmarks to measure: NAME=FILE,NAME=FILE,..."),
    Field("any_size", False, None,
          "Whether a file may have another number of problems than its benchmark."),
    Field("batch", 512, COUNT, "Answers sampled, graded and written at one time."),
    Field("backbone", "", None,
          "Backbone whose rows of papers stand in the table; empty = by the model's name."),
))
# fmt: on
FIELDS = by_name((*SECTIONS, BENCHMARKS))


def default() -> ConfigDict:
    """The tree of an experiment file (configs/): training, and the cold start and the probes of its models.

    Each entry point reads its own fields of it (trees.py).
    """
    return make_config(by_name(SECTIONS))
