"""What is measured of a trained model: `titan-dp evaluate KIND`; nothing but the command line imports it."""
