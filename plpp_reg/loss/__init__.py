"""The loss: equations, the words nearest to a vector, the regularizer. torch alone."""
