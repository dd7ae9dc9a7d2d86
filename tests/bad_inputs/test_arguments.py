"""Flags and numbers that no command can obey."""

from bad_inputs.catalogue import (
    CALIBRATE,
    EVAL,
    PRUNE,
    PRUNE_TEXT,
    RECOVER,
    TEXT,
    BadInput,
    refusals,
)

SEE = "see: cfsp prune --help"
TRAIN = "recover {pruned} --data {text} --out {out}"
NOTHING = "prune {model} --out {out}"
SWEEP = f"sweep {{model}} --eval {{text}} --out {{out}} {TEXT} --sparsity"
MANY = 10**30

FLAGS = [
    (f"{PRUNE} --sparse 0.5", "unknown argument --sparse", SEE),
    (f"{PRUNE} --channel-metric best", "found 'best'", SEE),
    (f"{PRUNE} --samples many", "invalid int value: 'many'", SEE),
    ("families --all", "unknown argument --all", "--help"),
    (
        "recover {pruned} --out {out} --steps 1 --max-minutes 1",
        "--max-minutes: not allowed with argument --steps",
        "--help",
    ),
    ("export {model} --out {out}", "arguments are required: --to", "--help"),
    (
        f"{PRUNE} --parts ffn,bloks",
        "--parts must be of ffn, kv, attention, blocks, experts, found 'bloks'",
        "; did you mean blocks?",
    ),
    (f"{NOTHING} --plan p --statistics s", "--plan and --statistics exclude", "made already"),
    (f"{NOTHING} --sparsity 0.95 {TEXT}", "cannot", "between 0 and 66.6%"),
    ("prune {model} --sparsity 0.2", "found none", "expected --out, the directory to write"),
    ("verify {model}", "{model} has no cfsp.json", "cfsp did not write it"),
    ("inspect {inputs}/absent", "{inputs}/absent does not exist", "give a directory"),
    ("inspect ~nobody-has-this-name/a", "name/a does not exist", "give a directory"),
    ("eval {model}", "found none", "expected --data, --tasks, --answers or several"),
    (
        f"{PRUNE_TEXT} --widths equal --set block_metric=angular",
        "block_metric=angular would do nothing",
        "give one of the two",
    ),
    (f"{SWEEP} 0.4 --set limit=4", "--limit", "need --tasks"),
    (f"{EVAL} --limit 4", "--limit is about --tasks", "add --tasks"),
    ("eval {model} --tasks piqa --windows 2", "--windows is about --data", "add --data"),
    ("eval {model} --tasks ,", "found ','", "--tasks: expected one name or several"),
    (f"{SWEEP} 0.4 --tasks ,", "found ','", "--tasks: expected one name or several"),
    (f"{PRUNE} --keep ,", "found ','", "--keep: expected one name or several"),
    (f"{NOTHING} --plan p --keep 0", "--plan and --keep exclude", "made already"),
    (f"{PRUNE_TEXT} --dry-run --eval {{text}}", "--dry-run and --eval exclude", "only a plan"),
    (f"{PRUNE_TEXT} --set windows=3", "windows=3 are of each text", "name one"),
    (f"{TRAIN} --set windows=3", "windows=3 are of each text", "name one"),
    (f"{TRAIN} --method full --rank 2", "--rank belongs to", "--method lora"),
    (f"{TRAIN} --teacher none --set teacher_weight=.5", "--teacher-weight needs", "a teacher"),
    ("export {model} --to vllm --type f16 --out {out}", "--type belongs to", "keeps the"),
]

NUMBERS = [
    (f"{CALIBRATE} --seed {MANY}", f"found {MANY}", "--seed must be at least 0 and at most"),
    (f"{RECOVER} --seed -1", "found -1", "--seed must be at least 0 and at most"),
    (f"{CALIBRATE} --samples {MANY}", f"found {MANY}", "--samples must be at least 1 and"),
    (f"{PRUNE} --estimate --seqlen 0", "found 0", "--seqlen must be at least 2 and at most"),
    (f"{EVAL} --seqlen {MANY}", f"found {MANY}", "at least 2 and at most"),
    (f"{PRUNE_TEXT} --eval {{text}} --windows 0", "found 0", "--windows must be at least 1"),
    (f"{CALIBRATE} --memory-budget 1e999", "found '1e999'", "expected a size such as 2GB"),
    (f"{EVAL} --device nonsense", "the device 'nonsense'", "choose another --device"),
    ("demo --sparsity 2", "found 2.0", "sparsity must be in [0, 1)"),
    (f"{PRUNE_TEXT} --multiple {MANY}", f"found {MANY}", "--multiple must be at most 96"),
    (f"{PRUNE_TEXT} --multiple many", "--multiple: expected a number or auto", "'many'"),
    (f"{TRAIN} --max-minutes nan", "found nan", "--max-minutes must be above 0"),
    (f"{RECOVER} --steps 0", "found 0", "--steps must be at least 1"),
    (f"{RECOVER} --batch-windows {MANY}", f"found {MANY}", "--batch-windows must be at least 1 a"),
    (f"{RECOVER} --seqlen {MANY}", f"found {MANY}", "--seqlen must be at least 8 and at most"),
    (f"{RECOVER} --learning-rate nan", "found nan", "--learning-rate must be above 0"),
    ("bench {model} --rounds 0", "found 0", "--rounds must be at least 1"),
    (f"bench {{model}} --batch {MANY}", f"found {MANY}", "--batch must be at least 1 and at most"),
    ("bench {model} --new-tokens 0", "found 0", "--new-tokens must be at least 1 and at most"),
    ("bench {model} --prompt 225", "can read 256 tokens at once", "a smaller --prompt"),
    ("eval {model} --tasks piqa --limit 0", "found 0", "--limit must be at least 1"),
    (f"eval {{model}} --tasks piqa --limit {MANY}", f"found {MANY}", "--limit must be at least 1"),
    ("eval {model} --tasks piqa --set shots=-1", "found -1", "--shots must be at least 0"),
]

CASES = [BadInput(*row) for row in FLAGS + NUMBERS]

test_refused = refusals(CASES)
