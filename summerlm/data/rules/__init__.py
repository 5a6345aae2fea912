"""What texts are left out or changed before they are trained on."""
