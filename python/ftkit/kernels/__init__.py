"""Operations: one file an operation, with its plain torch reference and the faster backends checked against it."""
