"""The base config: every field once, with its unit and origin; and the variants of a config.

A config file (configs/*.py) states only what differs from `base()`. Any field can be overridden on
the command line (`--config.teacher.ema_rate=0.05`). [P] marks the value of the paper that we follow
(arXiv 2603.24472, Tables 8-11), [S] the released SDPO scripts, [o] our own choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sdjax.validation import check, field

__all__ = ["base", "check", "field", "get_config", "shrink", "with_variants"]


def base() -> ConfigDict:
    """The complete config with the paper's SDPO defaults; fields cannot be added afterwards."""
    c = ConfigDict()
    c.mode = "train"  # what sdjax.main does, one of sdjax.validation.MODES
    c.seed = 0  # everything random follows from it and the step index
    c.model = _model()
    c.mesh = _mesh()
    c.data = _data()
    c.batch = _batch()
    c.sampling = _sampling()
    c.rollout = _rollout()
    c.reward = _reward()
    c.objective = _objective()
    c.teacher = _teacher()
    c.optimizer = _optimizer()
    c.train = _train()
    c.guard = _guard()
    c.eval = _eval()
    c.checkpoint = _checkpoint()
    c.log = _log()
    c.sft = _sft()
    c.generate = _generate()
    c.analysis = _analysis()
    c.plan = _plan()
    c.profile = _profile()
    c.distributed = _distributed()
    c.lock()
    return c


def _model() -> ConfigDict:
    m = ConfigDict()
    m.path = "tiny"  # folder, hub name, gs:// path, or "tiny" for the packaged model
    m.compute_dtype = "auto"  # matmul inputs: float32, bfloat16; auto = bfloat16 off the CPU
    m.attention = "auto"  # xla, splash (TPU), cudnn (GPU), reference; auto by backend
    m.remat = "full"  # what the backward pass recomputes per layer: none, dots, full
    m.lora = ConfigDict()
    m.lora.rank = 0  # 0 trains all parameters; OPSD uses 64
    m.lora.alpha = 128.0  # adapters are scaled by alpha / rank
    m.lora.targets = ("q", "k", "v", "o", "gate", "up", "down")  # projections with an adapter
    m.lora.dropout = 0.0  # on the adapter's input
    return m


def _mesh() -> ConfigDict:
    m = ConfigDict()
    m.data = -1  # replicas; -1 = all devices that the other axes leave
    m.fsdp = 1  # splits parameters and rows
    m.tensor = 1  # splits heads, feed-forward and vocabulary
    m.context = 1  # splits long sequences
    return m


def _data() -> ConfigDict:
    d = ConfigDict()
    d.name = "synthetic"  # a source of sdjax.data.problems
    d.path = ""  # local file or folder of that source; empty = SDJAX_DATA, else the hub
    d.hub = ""  # hub data set (name "hub", or instead of a source's usual one)
    d.hub_config = ""  # configuration of the hub data set; empty = its default
    d.split = ""  # empty = the source's first; synthetic: train, test, ood_steps, ...
    d.columns = ConfigDict()  # dotted column paths; empty = the usual names (sdjax.data.columns)
    d.columns.prompt = ""  # text, or chat messages of which the last is the user's
    d.columns.answer = ""  # the gold
    d.columns.solution = ""  # worked solution, privileged (teacher.context kind "solution")
    d.columns.feedback = ""  # fixed hint, privileged
    d.columns.system = ""  # system message of this row
    d.columns.id = ""  # empty and no usual name: the row's index
    d.prompt_style = "auto"  # as_is, bare, boxed [P], answer_line (DAPO), opsd; auto by source
    d.dedupe = True  # keep the first of equal prompts; |D|=1 files repeat one question 64 times
    d.on_bad_row = "skip"  # rows without prompt or gold: skip (logged with index) or refuse
    d.limit = placeholder(int)  # at most so many problems, in the file's order; None = all
    d.synthetic_size = 4096  # problems of the synthetic source [o]
    d.synthetic_level = placeholder(int)  # difficulty of the synthetic source; None = mixed
    d.overlap_ngram = 20  # words in a row that count as train/eval overlap [o]
    d.on_overlap = "report"  # training questions of an evaluation set: report (log) or drop
    d.subset_size = placeholder(int)  # task coverage |D| [P Sec. 6.2]; None = all problems
    d.enable_thinking = True  # passed to the chat template [P: on]
    d.system = placeholder(str)  # system message; None = the template's own default
    d.chat_template = placeholder(str)  # Jinja text for tokenizers without a template
    d.max_prompt_len = 2048  # tokens [P Table 8]
    d.on_long_prompt = "drop"  # prompts over the limit: drop (counted) or truncate from the left
    return d


def _batch() -> ConfigDict:
    b = ConfigDict()
    b.prompts = 256  # problems per training batch [P Table 8]
    b.mini_prompts = 128  # problems per optimizer step [P: 64 or 128]; must divide prompts
    b.group_size = 8  # G, responses per problem [P Table 8]
    b.row_len = 0  # tokens of a packed student row; 0 = the longest that may occur
    b.teacher_row_len = 0  # the same for teacher rows
    b.micro_rows = 0  # rows per forward pass over all devices; 0 = one per device
    return b


def _sampling() -> ConfigDict:
    s = ConfigDict()
    s.temperature = 1.0  # [P Table 8]; the loss divides logits by the same number
    s.top_p = 1.0  # [S]
    s.top_k = 0  # 0 = off [S]
    s.min_p = 0.0  # 0 = off
    s.max_new_tokens = 20480  # response limit in tokens [P Table 8]
    return s


def _rollout() -> ConfigDict:
    r = ConfigDict()
    r.slots = 64  # responses decoded at the same time on one host's devices
    r.tensor = 0  # splits heads, feed-forward and vocabulary while sampling; 0 = as mesh.tensor
    r.chunk = 32  # decode steps per call from the host
    r.cache_dtype = "auto"  # KV cache: auto = compute dtype, float32, bfloat16, int8
    r.first_length = 128  # columns of the KV cache at first; it doubles while rows grow longer
    r.warm_up = False  # compile all programs before the first batch, not when first needed
    r.row_halvings = 3  # how often the slots may be halved at the end, when nothing waits
    return r


def _reward() -> ConfigDict:
    r = ConfigDict()
    r.name = "math"  # a reward of sdjax.rewards, or "package.module:function"
    r.workers = 2  # verifier processes per host
    r.deadline_s = 2.0  # seconds per answer before its worker is killed
    r.memory_mb = 1024  # memory limit of a worker
    r.max_answer_chars = 1000  # a longer answer is wrong unless it repeats the gold
    r.box_in_unclosed_think = False  # count a box inside a <think> that never closes
    r.fallback = True  # math-verify judges notation that our own reader does not have
    return r


def _objective() -> ConfigDict:
    o = ConfigDict()
    o.pg_coef = 0.0  # c_pg, weight of the policy-gradient loss; GRPO 1
    o.distill_coef = 1.0  # c_d, weight of the distillation loss; SDPO 1
    o.kl_coef = 0.0  # weight of the KL to the initial policy [P Table 9: 0]
    o.entropy_coef = 0.0  # weight of the entropy bonus [S: 0]
    o.direction = 1.0  # distillation towards (+1) or away from (-1) the teacher
    o.loss_agg = "rows-incl-masked"  # METHODS 1.3: what the released scripts really compute
    o.norm_n = 0.0  # divisor of seq-mean-token-sum-norm; 0 = sampling.max_new_tokens
    # Policy gradient [P Table 9]
    o.clip_low = 0.2  # eps_low
    o.clip_high = 0.28  # eps_high, "clip-higher"
    o.dual_clip = 3.0  # c of dual clip; inf = off
    o.norm_adv_by_std = False  # the paper's GRPO is mean-centred only [S]
    o.kl_estimator = "k3"  # k1, k2, k3 or abs
    o.mod = "none"  # the teacher modulates advantages: none, add_u, anti_phi (AntiSD), mult_rlsd
    o.mod_lam = 0.5  # lambda of the modulation [AntiSD, RLSD: 0.5]
    o.mod_eps_w = 0.2  # clip of RLSD's evidence weight
    # Distillation [P Table 10]
    o.alpha = 0.5  # JSD mixture; 0 forward KL, 1 reverse KL
    o.support = "student_topk"  # student_topk, teacher_topk, full, sampled
    o.distillation_topk = 100  # K
    o.add_tail = True  # one bucket for the mass outside the top-k; False renormalises
    o.elem_clip = math.inf  # OPSD's clip of each vocabulary term
    o.token_clip = math.inf  # clip of the whole token's divergence
    o.skip_first = 0  # response tokens at the start that are not distilled
    o.prefix_len = 0  # distil only so many first tokens; 0 = all
    # Importance weights
    o.is_clip = 2.0  # cap of exp(student_logp - old_logp) in distillation; inf = 1 never cut
    o.rollout_is_clip = 2.0  # cap of exp(old_logp - sampler_logp) on both losses [P Table 9]
    o.rollout_is_level = "token"  # token or sequence
    o.allow_truncated_sampling = False  # importance ratios with top-p/top-k sampling are biased
    o.chunk = 0  # response slots per head chunk; 0 = chosen from the vocabulary
    return o


def _teacher() -> ConfigDict:
    t = ConfigDict()
    t.kind = "ema"  # fixed, ema, snapshot, live, trust_region
    t.ema_rate = 0.0  # r: teacher <- (1-r) teacher + r student per batch [P Table 10: 0 = fixed]
    t.snapshot_every = 50  # steps between copies (kind snapshot)
    t.trust_mix = 0.05  # r of the trust-region teacher's logits
    t.context = ConfigDict()
    x = t.context
    x.kind = "sibling"  # sibling, solution, feedback, instruction
    x.fallback = "none"  # when no sibling is correct: none or solution
    x.success_threshold = 0.5  # reward from which a sibling counts as correct [S]
    x.self_exclude = True  # a rollout never sees its own text [S]
    x.strip_think = False  # remove <think> from the demonstration; False is "c = s" [P]
    x.strip_style = "analysis"  # how: analysis [P; also closes without opening], sdpo, trl
    x.choice = "first"  # which correct sibling: first [S] or random
    x.use_feedback = False  # also show the verifier's feedback [S: off for mathematics]
    x.feedback_only_without_solution = True  # [S]
    x.reveal_ratio = 1.0  # share of the solution's paragraphs shown, its answer always (ATESD)
    x.template = "paper"  # a preset of sdjax.teacher.templates, or the text itself
    x.solution_template = ""  # section around the solution; empty = the preset's
    x.feedback_template = ""  # section around the feedback; empty = the preset's
    x.thinking = "student"  # thinking switch of the teacher's chat template: student, on, off
    x.max_len = 22528  # tokens of the teacher's prompt [S]
    x.truncate = "demonstration"  # what gives way: its start [o], right [S], left (TRL)
    return t


def _optimizer() -> ConfigDict:
    o = ConfigDict()
    o.lr = 1e-5  # [P Table 10: SDPO 1e-5; Table 9: GRPO 1e-6]
    o.warmup_steps = 10  # optimizer steps of linear warm-up [P Table 8]
    o.schedule = "constant"  # constant, cosine or linear decay to final_lr_frac over all steps
    o.final_lr_frac = 0.1  # of lr, where the schedule ends
    o.b1 = 0.9
    o.b2 = 0.999  # [S]
    o.eps = 1e-8
    o.weight_decay = 0.01  # [P Table 8]
    o.clip_norm = 1.0  # global gradient norm [P Table 8]
    o.state_dtype = "float32"  # of the first moment: float32 or bfloat16
    return o


def _train() -> ConfigDict:
    t = ConfigDict()
    t.steps = 100  # training batches [P: runs are read at <= 100 steps]
    return t


def _guard() -> ConfigDict:
    g = ConfigDict()
    g.max_prob_error = 1.05  # mean exp|trainer_logp - sampler_logp| that stops the run
    g.max_skipped = 5  # updates in a row with a non-finite gradient before the run stops
    return g


def _eval() -> ConfigDict:
    e = ConfigDict()
    e.sets = ("aime24",)  # sources evaluated during training
    e.every = 10  # steps; 0 = only at the start and the end
    e.preset = ""  # thinking, non_thinking or paper (by data.enable_thinking) [P]; "" = the fields
    e.samples = 16  # k of avg@k [P Table 11]
    e.pass_at = ()  # the k of pass@k, each <= samples (unbiased); () = samples alone [P]
    e.grade_after_think = True  # grade what follows the first closed <think> [P, METHODS 3.8]
    e.problems = placeholder(int)  # at most so many problems per set; None = all
    e.temperature = 0.6  # [P Table 11, thinking on]
    e.top_p = 0.95  # [P Table 11]
    e.top_k = 20  # [P Table 11; the released script never passes it: 0 repeats it]; no preset's
    e.min_p = 0.0
    e.max_new_tokens = 38912  # [P Table 11]
    return e


def _checkpoint() -> ConfigDict:
    k = ConfigDict()
    k.every = 10  # steps [S]; the last step is always saved
    k.keep = 2  # newest checkpoints kept
    k.best_metric = ""  # evaluation metric whose best checkpoint is kept too; empty = none
    k.export = True  # write a Hugging Face folder at the end
    k.export_dtype = "bfloat16"
    k.export_lora = "merged"  # under LoRA: the merged model, or the adapters alone (PEFT's format)
    return k


def _log() -> ConfigDict:
    g = ConfigDict()
    g.text_every = 10  # steps between samples logged as text; 0 = never
    g.text_samples = 2  # responses (and teacher prompts) per such log
    g.kl_to_initial = True  # measure the KL to the initial policy: costs a copy and a forward
    return g


def _sft() -> ConfigDict:
    s = ConfigDict()  # read by sdjax.sft and sdjax.data.supervised; all values our own
    s.init = "model"  # start from the weights of model.path, or from "scratch"
    s.arch = ConfigDict()  # sizes of the model that "scratch" makes
    s.arch.d_model = 128
    s.arch.n_layers = 4
    s.arch.n_heads = 4
    s.arch.n_kv_heads = 2
    s.arch.head_dim = 32
    s.arch.d_ff = 512
    s.source = "reasoner"  # examples: reasoner (simulated traces) or jsonl (sft.path)
    s.path = ""  # JSONL file with fields prompt and response
    s.steps = 1000  # optimizer updates
    s.examples = 64  # per update
    s.rows = 0  # packed rows per update; 0 = one per example, so that nothing is dropped
    s.row_len = 256  # tokens of a row; longer examples are dropped (counted)
    s.slots = 0  # learnt tokens of a row; 0 = row_len
    s.drill_start = 0.9  # share of plain arithmetic facts among the first examples (reasoner)
    s.drill_until = 0.5  # fraction of the run after which there are none
    return s


def _generate() -> ConfigDict:
    g = ConfigDict()
    g.prompt = ""  # the user's turn to answer; empty = read lines from the terminal
    g.n = 1  # responses per prompt; a single one is streamed
    return g


def _analysis() -> ConfigDict:
    a = ConfigDict()
    a.kind = "report"  # what mode=analyze writes: report, compare, word_shift, token_kl, judge
    a.workdirs = ()  # runs that compare puts side by side; seeds of a method are averaged
    a.base = ""  # responses (JSON lines with "response") of the base model, for word_shift
    a.responses = ()  # files of responses: word_shift's models, or those that judge reads
    a.min_count = 5  # words rarer than this in the base responses are left out of word_shift [o]
    a.problems = 32  # groups that token_kl samples from the training data
    a.min_tokens = 50  # token_kl leaves out surface forms that occur less often [o]
    a.judge_replies = ""  # a judge's replies (JSON lines); empty = only write the prompts
    return a


def _plan() -> ConfigDict:
    p = ConfigDict()
    p.topology = "v5e:2x4"  # TPU slice to plan for: chip:XxY or chip:XxYxZ, sizes in chips
    p.topologies = ""  # comma-separated slices to compare instead
    p.limit_frac = 0.85  # of a chip's memory that a plan may use and still "fits"
    p.response_len = 0.0  # mean response length in tokens for the times; 0 = half the limit
    p.decode = True  # also compile prefill and decode
    p.suggest = True  # look for the nearest settings that fit when these do not
    return p


def _profile() -> ConfigDict:
    p = ConfigDict()
    p.steps = ""  # training batches to trace for xprof, "10:13" for 10, 11, 12; empty = none
    p.hlo = False  # dump the compiled programs' text under <workdir>/hlo
    p.compilation_cache = "auto"  # folder; auto = <workdir>/xla_cache, empty = off
    return p


def _distributed() -> ConfigDict:
    d = ConfigDict()
    d.method = "auto"  # how processes find each other: auto, single, explicit, slurm, tpu
    d.coordinator = ""  # host:port of process 0 (explicit); empty = JAX_COORDINATOR_ADDRESS
    d.num_processes = 0  # processes in all (explicit); 0 = JAX_NUM_PROCESSES
    d.process_id = -1  # this process (explicit); -1 = JAX_PROCESS_ID
    d.startup_timeout_s = 300.0  # seconds to wait for missing processes
    d.heartbeat_timeout_s = 100.0  # seconds of silence after which a process counts as dead
    return d


def with_variants(
    c: ConfigDict, arg: str | None, variants: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """Applies the variants named after the colon of `--config=FILE:a,b`; `tiny` exists everywhere.

    Each variant changes `c` in place. Raises ValueError with the list of known ones.
    """
    known = {**variants, "tiny": variants.get("tiny", shrink)}
    names = [name for name in (arg or "").split(",") if name]
    for name in sorted(names, key=lambda n: n == "tiny"):  # shrinking comes last
        if name not in known:
            raise ValueError(f"unknown config variant {name!r}: known are {', '.join(known)}")
        known[name](c)
    return c


def shrink(c: ConfigDict) -> None:
    """Turns any config into a smoke run of two small steps on the embedded model."""
    c.model.path = "tiny"
    c.model.remat = "none"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context = -1, 1, 1, 1
    c.data.name, c.data.path, c.data.split = "synthetic", "", ""
    c.data.system = None
    c.data.max_prompt_len = 128
    c.batch.prompts, c.batch.mini_prompts, c.batch.group_size = 4, 2, 4
    c.sampling.max_new_tokens = 48
    c.rollout.slots, c.rollout.tensor = 16, 0
    c.objective.distillation_topk = min(c.objective.distillation_topk, 32)
    c.teacher.context.max_len = 256
    c.train.steps = 2
    c.eval.sets, c.eval.problems, c.eval.samples, c.eval.every = ("test", "ood_steps"), 8, 2, 0
    c.eval.max_new_tokens = 48
    c.checkpoint.every = 1
    c.log.text_every = 1


def get_config(arg: str = "") -> ConfigDict:
    """The base config itself as a config file, for modes that need no other (doctor)."""
    return with_variants(base(), arg, {})
