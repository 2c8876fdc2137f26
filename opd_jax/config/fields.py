"""The config tree: every field with its default and meaning; rules.py has what must hold between them.

A config file (configs/) starts from `default()` and sets numbers; the command line overrides any
field (`--config.rollout.temperature=0.8`).
Values from papers quote their source in configs/recipes.py.
"""

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """Every field. The text after each is its documentation."""
    config = ConfigDict()
    config.seed = 0  # of data order, rollouts and evaluation
    config.steps = 100  # rollout batches to train on

    for role in ("student", "teacher", "reference"):
        model = config[role] = ConfigDict()
        model.path = ""  # Hugging Face folder or hub name; reference: empty = the student at step 0
        model.dtype = "auto"  # compute: auto = bfloat16 on GPU, float32 on CPU
        model.rope_theta = 0.0  # base of the positions; 0 = what its config.json says
        model.max_position = 0  # longest row; 0 = what its config.json says
        model.chat_template = ""  # Jinja file; empty = the tokenizer's own
        model.enable_thinking = True  # handed to chat templates that know it (Qwen3)
    config.teacher.path = ""  # ... or "student": the same model, shown a prompt of its own
    config.teacher.follow = "frozen"  # average | live: it changes as the student does
    config.teacher.decay = 0.99  # of the moving average

    data = config.data = ConfigDict()
    data.train = "tiny:train"  # problems with golden solutions: tiny:SPLIT, .jsonl, .json, .parquet
    data.columns = ConfigDict()  # dotted paths into a row; empty = found by the names people use
    data.columns.problem = ""
    data.columns.solution = ""
    data.columns.answer = ""
    data.columns.id = ""
    data.bad_rows = "refuse"  # skip: rows that cannot be used are dropped and counted
    data.prompt_template = "{problem}"  # user's turn; {answer} and {solution} are filled in too
    data.system_prompt = ""  # system's turn; empty = the row's own, if any; none = no such turn
    data.teacher_prompt_template = "same"  # what the teacher is shown instead
    data.teacher_system_prompt = "same"
    # Day that chat templates print, YYYY-MM-DD; empty = that on which the workdir is made
    data.date = ""
    data.shuffle = True  # global order, drawn from the seed
    data.epochs = 0.0  # passes over the data that set `steps`; 0 = `steps` says
    data.size = 20_000  # problems of the generated data set before it repeats

    rollout = config.rollout = ConfigDict()
    rollout.prompts_per_step = 16
    rollout.samples_per_prompt = 4
    rollout.max_prompt_tokens = 64
    rollout.max_response_tokens = 192
    # Rollouts are drawn at this temperature; what they are scored at is scoring.temperature.
    rollout.temperature = 1.0
    rollout.top_p = 1.0
    rollout.top_k = 0  # most likely ids that are sampled among; 0 = all
    rollout.slots = 0  # sequences decoded at one time; 0 = all of a step's
    # A row ends when its last so many tokens repeat with a short period; 0 = never, as in the papers.
    rollout.stop_on_repetition = 0
    rollout.repetition_period = 16  # the longest such period

    sample = config.sample = ConfigDict()  # the teacher's solutions, by launch/sample.py
    sample.problems = 0  # the first of data.train; 0 = all
    sample.samples = 1  # solutions a problem
    sample.batch = 64  # problems sampled, graded and written at one time
    sample.slots = 0  # sequences decoded at one time; 0 = all of a batch's
    sample.temperature = 0.7  # 2604.13016, C.1: "temperature 0.7, top-p=0.95"
    sample.top_p = 0.95
    sample.top_k = 0
    sample.max_response_tokens = 0  # 0 = rollout.max_response_tokens
    sample.keep_wrong = False  # also solutions whose answer is wrong, or cannot be read
    sample.keep_repetitive = False  # also those that `metrics` calls repetitive

    probe = config.probe = ConfigDict()  # questions to a pair of models, by launch/probe.py
    probe.problems = 64  # the first of data.train that training would see
    probe.batch = 64  # responses sampled at one time, between two lines of progress
    probe.depths = ()  # tokens of student prefixes; empty = 1/8, 1/4, 1/2 of max_response_tokens

    scoring = config.scoring = ConfigDict()
    scoring.token_chunk = 2048  # tokens whose logits exist at one time while scoring
    # Logits of student, teacher and reference are divided by this before log-probs are taken, in
    # advantage, ratio, KL and divergence alike; 1 = the models as they are (docs/objectives.md).
    scoring.temperature = 1.0
    scoring.overlap_top_k = 16  # k of the overlap metrics (2604.13016 uses 16)
    scoring.special_tokens = (
        "remap"  # ids with two meanings: remap | mask | keep (data/alignment.py)
    )
    scoring.mask_first = ()  # texts whose first occurrence in a response is not scored (2603.25562)

    loss = config.loss = ConfigDict()
    loss.pg_weight = 1.0  # w_pg of the clipped surrogate
    loss.teacher_coef = 1.0  # its advantage: this much of the teacher's log-ratio,
    loss.group_coef = 0.0  # and this much of the group-relative verifiable reward (GRPO)
    loss.group_normalise = True  # divide by the group's standard deviation; False: Dr.GRPO
    loss.advantage = "sampled"  # the teacher's, of the sampled token | support: of every id of it
    loss.advantage_clamp = 0.0  # the teacher's log-ratio is cut to this; 0 = not (2603.25562: 5)
    loss.discount = (
        0.0  # of the teacher's later log-ratios; 0 = a token's own, 1 = the whole return
    )
    loss.support_weight = "student"  # of ids in that advantage: student | teacher | uniform
    loss.clip_low = 0.2
    loss.clip_high = 0.2
    loss.dual_clip = 0.0  # bound of the loss of a token with negative advantage; 0 = none (verl: 3)
    loss.importance_cap = 0.0  # of scorer against sampler, a token; 0 = no such weight (often 2)
    loss.divergence_weight = 0.0  # w_div of D(student, teacher)
    loss.support = (
        "full"  # ids that D or the advantage is over: full, or top-k of student | teacher
    )
    #                        | intersection | union | symmetric_difference
    loss.top_k = 16
    loss.direction = "reverse"  # KL(student || teacher) | forward: KL(teacher || student) | jsd
    #                             | skewed_reverse | skewed_forward
    loss.form = "raw"  # sums over a support as they are | renormalised | tail | stop_gradient
    loss.jsd_beta = 0.5  # b of the generalised Jensen-Shannon divergence
    loss.skew = 0.1  # a of the skewed ones (2402.03898)
    loss.lambda_gold = 0.0  # weight of the supervised loss on golden solutions
    loss.beta_kl = 0.0  # weight of KL(student || reference) on visited prefixes
    loss.kl_estimator = "full"  # full | k1 | k2 | k3
    loss.kl_clamp = 10.0  # bound of k3, a token: beyond it no gradient (verl: 10); 0 = none
    loss.aggregation = "sequence"  # of rollouts: mean over responses of their means | token
    #                                | constant: sum over tokens / (responses * budget), Dr.GRPO
    loss.gold_aggregation = "token"  # of golden solutions: token | sequence
    loss.truncated = "keep"  # rollouts that ran out of budget: keep | mask | tail: leave out their
    loss.truncated_tail = 256  # last so many tokens
    loss.repeated = "keep"  # tokens that repeat (metrics.repeated_tokens): keep | mask

    optim = config.optim = ConfigDict()
    optim.learning_rate = 1e-6
    optim.schedule = "constant"  # constant | linear | cosine, to 0 at `steps`
    optim.warmup_steps = 0  # optimizer steps, of which a rollout batch has updates_per_rollout
    optim.warmup_fraction = 0.0  # of `steps`, where warmup_steps is 0
    optim.beta1 = 0.9
    optim.beta2 = 0.999
    optim.weight_decay = 0.0
    optim.grad_clip = 1.0  # global norm
    optim.token_chunk = 2048  # tokens whose logits exist at one time in the update
    optim.microbatch_tokens = 16_384  # tokens that go through the models of a replica at one time
    optim.updates_per_rollout = 1  # optimizer steps a rollout batch is split into
    # What each layer keeps for the backward pass, where the rest is computed again: none: all of it |
    # attention: what fused attention returned | dots: that and its matrix products | full: nothing
    optim.remat = "none"

    mesh = config.mesh = ConfigDict()  # devices: docs/multi_gpu.md
    mesh.data = -1  # rows are divided over data x fsdp; -1 = as many as there are devices for
    mesh.fsdp = 1  # devices that have slices of the models that are sharded
    mesh.tensor = 1  # devices that share heads and MLP of every layer
    for role in ("student", "teacher", "reference"):
        mesh[role] = "replicated"  # compute weights | sharded: each device of fsdp has a slice

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every = 50  # steps; 0 = only at the end
    checkpoint.keep = 2  # of these; one that an early end made stays until a newer one is complete
    checkpoint.grace_seconds = 300.0  # after SIGTERM or SIGINT, for the step in hand and saving
    checkpoint.deadline_minutes = (
        0.0  # from its start, by which a run has saved and ended; 0 = none
    )

    evaluation = config.eval = ConfigDict()
    evaluation.every = 0  # steps between evaluations on the way; 0 = only before and after
    evaluation.data = "tiny:test"  # held-out problems, named as in data.train; empty = none
    evaluation.problems = 200
    evaluation.samples = 1  # answers a problem (k of avg@k)
    evaluation.temperature = 0.6
    evaluation.top_p = 1.0
    evaluation.top_k = 0
    evaluation.teacher = True  # also measure the teacher, for the closing table
    evaluation.match = ""  # regular expression; the share of answers it is found in is reported
    # Where answers without a box are looked for: answer_line, after_think, last_number, in this order.
    evaluation.fallbacks = ()
    evaluation.max_response_tokens = 0  # 0 = rollout.max_response_tokens
    # sequences decoded at one time; 0 = rollout.slots or 256, or in launch/evaluate.py what fits
    evaluation.slots = 0
    evaluation.best = ""  # metric by which best/ keeps a checkpoint (accuracy, ...); empty = none
    # Of launch/evaluate.py alone; there eval.problems=0 means all, eval.samples=0 the benchmark's own.
    evaluation.benchmarks = ""  # NAME=FILE,NAME=FILE,... ; docs/evaluation.md has the names
    evaluation.any_size = False  # also take a file of another size than the benchmark has
    evaluation.batch = 512  # answers sampled, graded and written at one time
    evaluation.backbone = ""  # whose rows of papers stand in the table; empty = by the model's name

    # Who decides whether an answer is right, for rewards and evaluations, in processes of its own.
    grading = config.grading = ConfigDict()
    # guarded: math-verify under the rules of docs/evaluation.md | math_verify: its bare verdict
    grading.grader = "guarded"
    grading.processes = 0  # 0 = one per core that the run may use, 8 at most
    grading.seconds = 5.0  # limit of processor time per answer; beyond it the grade is TIMEOUT

    metrics = config.metrics = ConfigDict()
    metrics.repetition_tail = 10_000  # L: characters of the tail that is compressed (2604.08527)
    metrics.repetition_threshold = 10.0  # tau: compression ratio above which a text repeats itself
    metrics.repetition_level = 6  # of zlib, 1 to 9; "fixed", but not named in 2604.08527
    metrics.repeated_tokens = "tail"  # the tails RepRate flags (2604.08527) | ngram (2605.11182)
    metrics.repeated_ngram = 3  # n of ngram: a token repeats if it completes an n-gram seen before
    metrics.positions = (256, 512, 1024, 2048, 4096, 8192)  # score/* also of the first N tokens
    # Of 2605.11182, page; its code counts step, first, second, third, but, wait, let.
    metrics.hedging = ("wait", "but", "maybe")

    collapse = config.guard = ConfigDict()  # docs/guard.md
    # What is done about a collapse: off | warn: say and log it | stop: save and end | strengthen: raise
    # beta_kl and lambda_gold | mask: leave repetitive tails out of the loss | rollback: go back to the
    # checkpoint before it, and go on strengthened
    collapse.action = "off"
    collapse.false_alarm_every = 1000  # steps in which chance alone may raise one signal once
    collapse.memory = 50  # steps that "healthy" is the mean of
    collapse.patience = 20  # healthy steps that end an alarm, or take back one strengthening
    collapse.factor = 2.0  # by which an alarm multiplies beta_kl and lambda_gold
    collapse.beta_kl_floor = 0.01  # first raised value where loss.beta_kl is 0
    collapse.beta_kl_max = 1.0  # 0 = never raised
    collapse.lambda_gold_floor = 0.1  # first raised value where loss.lambda_gold is 0
    collapse.lambda_gold_max = 2.0  # 0 = never raised; else data.train needs golden solutions
    collapse.max_rollbacks = 3  # after so many the run is stopped
    # Updates with a loss, a gradient or a log-prob that is not finite may be left out so often, then the
    # run stops: docs/reliability.md
    collapse.skip_nonfinite = 0
    collapse.spike = 0.0  # gradient norm that is one, in running means of it; 0 = not looked at
    collapse.spike_action = "warn"  # log it | skip: leave the update out
    collapse.copies = 0  # steps between two looks whether devices hold the same weights; 0 = never

    log = config.log = ConfigDict()
    log.every = 1  # steps between lines of metrics.jsonl
    log.rollouts = 1  # rollouts a logged step writes to rollouts.jsonl
    log.gradients = 50  # steps between two looks at each term's own gradient; 0 = never
    log.tensorboard = (
        False  # also write the lines of metrics.jsonl to tensorboard/ (docs/report.md)
    )
    log.wandb = ""  # also to this project of Weights & Biases, offline unless WANDB_MODE says else

    profile = config.profile = ConfigDict()  # docs/profiling.md
    profile.start_step = 3  # the first step that is traced: earlier ones compile
    profile.steps = 0  # how many are traced, into the workdir's profile/; 0 = none
    return config.lock()
