"""One thin file a method. This table is all there is to register; ``X_PLPP`` comes with ``X``."""

TRAINERS = {
    "ZeroshotCLIP": "plpp_reg.trainers.zeroshot:ZeroshotCLIP",
    "ZeroshotCLIP2": "plpp_reg.trainers.zeroshot:ZeroshotCLIP2",
    "CoOp": "plpp_reg.trainers.coop:CoOp",
    "CoCoOp": "plpp_reg.trainers.cocoop:CoCoOp",
    "KgCoOp": "plpp_reg.trainers.kgcoop:KgCoOp",
    "ProGrad": "plpp_reg.trainers.prograd:ProGrad",
    "MaPLe": "plpp_reg.trainers.maple:MaPLe",
    "IVLP": "plpp_reg.trainers.ivlp:IVLP",
    "VPT": "plpp_reg.trainers.vpt:VPT",
    "PromptSRC": "plpp_reg.trainers.promptsrc:PromptSRC",
    "PromptKD": "plpp_reg.trainers.promptkd:PromptKD",
    "FDBPL": "plpp_reg.trainers.fdbpl:FDBPL",
    "CoOp_KDPL": "plpp_reg.trainers.kdpl:CoOp_KDPL",
    "KgCoOp_KDPL": "plpp_reg.trainers.kdpl:KgCoOp_KDPL",
    "MaPLe_KDPL": "plpp_reg.trainers.kdpl:MaPLe_KDPL",
    "VPT_KDPL": "plpp_reg.trainers.kdpl:VPT_KDPL",
    "PromptSRC_KDPL": "plpp_reg.trainers.kdpl:PromptSRC_KDPL",
}

# What a table of results must know of a method that it does not import: the node below TRAINER that it reads (some share one,
# as upstream has it), whether it learns nothing, and whether it trains on what it is tested on, without labels.
NODES = {
    "ZeroshotCLIP": "ZEROSHOT",
    "ZeroshotCLIP2": "ZEROSHOT",
    "CoOp": "COOP",
    "CoCoOp": "COCOOP",
    "KgCoOp": "COOP",
    "ProGrad": "COOP",
    "MaPLe": "MAPLE",
    "IVLP": "IVLP",
    "VPT": "VPT",
    "PromptSRC": "PROMPTSRC",
    "PromptKD": "PROMPTKD",
    "FDBPL": "FDBPL",
    "CoOp_KDPL": "COOP",
    "KgCoOp_KDPL": "COOP",
    "MaPLe_KDPL": "MAPLE",
    "VPT_KDPL": "VPT",
    "PromptSRC_KDPL": "PROMPTSRC",
}
KDPL = "KDPL"  # what X_KDPL reads beside X's own
UNTRAINED = ("ZeroshotCLIP", "ZeroshotCLIP2")
TRANSDUCTIVE = ("PromptKD",)
