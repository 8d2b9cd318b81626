// What the runner refuses on purpose: bad arguments, and bundles that are damaged or not for this machine.
#pragma once

#include <stdexcept>
#include <string>

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
  Refused(const std::string& path, const std::string& reason) : std::runtime_error(path + ": " + reason) {}
};
