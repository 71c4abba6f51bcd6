// What a device needs of the manifest that runtime/manifest.py specifies.
#pragma once

#include <string>
#include <vector>

struct Manifest {
    int height, width, channels;
    std::string resize;  // "bilinear", "crop" or "none"
    std::vector<std::string> classes;
    double temperature;             // logits are divided by it before probabilities are computed
    std::vector<std::string> cams;  // outputs that hold class activation maps
};

// Throws std::runtime_error with what was expected where the text is no manifest that this program can serve.
Manifest read_manifest(const std::string& text);

// Return the probabilities of logits, in double as runtime.classifier does.
std::vector<double> softmax(const std::vector<float>& logits, double temperature);
