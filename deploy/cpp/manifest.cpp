#include "manifest.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>

Manifest read_manifest(const std::string& text) {
    if (text.empty())
        throw std::runtime_error("a file without a clearpact manifest; export it with `python -m export.onnx`");
    Manifest found;
    try {
        const auto values = nlohmann::json::parse(text);
        if (values.at("version") != 1)
            throw std::runtime_error("manifest version " + values.at("version").dump() + ", expected 1");
        if (!values.value("float_layout", "").empty())
            throw std::runtime_error("takes floats that are normalized already, expected uint8 pixels; export it "
                                     "from a checkpoint");
        const auto& input = values.at("input");
        found = {input.at("size").at(0), input.at("size").at(1), input.at("channels"), input.at("resize"),
                 values.at("classes"),   values.value("temperature", 1.0), {}};
        for (const auto& cam : values.value("cams", nlohmann::json::array())) found.cams.push_back(cam.at("output"));
    } catch (const nlohmann::json::exception& error) {
        throw std::runtime_error(std::string("its manifest cannot be read (") + error.what() +
                                 "); export it with `python -m export.onnx`");
    }
    if (found.height < 1 || found.width < 1 || (found.channels != 1 && found.channels != 3) ||
        found.classes.empty() || !(found.temperature > 0))
        throw std::runtime_error("its manifest has values out of range; export it with `python -m export.onnx`");
    return found;
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature) {
    const double largest = *std::max_element(logits.begin(), logits.end());
    std::vector<double> found;
    double sum = 0;
    for (float logit : logits) sum += found.emplace_back(std::exp((logit - largest) / temperature));
    for (double& probability : found) probability /= sum;
    return found;
}
