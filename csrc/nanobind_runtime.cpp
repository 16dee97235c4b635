// nanobind's own runtime, compiled from the installed nanobind package, so that no CMake is needed.
#include "nb_combined.cpp"
