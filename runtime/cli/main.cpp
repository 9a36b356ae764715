// pock-run: train, evaluate and inspect compiled programs. One static file, no dependencies.
#include "commands.h"

int main(int argc, char** argv) { return pockc::cli::dispatch(argc, argv); }
