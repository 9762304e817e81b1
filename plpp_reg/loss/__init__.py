"""The loss: equations, the words nearest to a vector, the regularizer. torch alone."""

SUFFIX = "_PLPP"  # X_PLPP is the method X with the term added
