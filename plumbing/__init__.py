"""What every program needs and no paper is about. Each file opens with what it is for."""
