"""One thin file a method. This table is all there is to register; ``X_PLPP`` comes with ``X``."""

TRAINERS = {
    "ZeroshotCLIP": "plpp_reg.trainers.zeroshot:ZeroshotCLIP",
    "CoOp": "plpp_reg.trainers.coop:CoOp",
}
