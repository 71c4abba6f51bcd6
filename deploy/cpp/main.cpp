// Class, probability and map of pictures: one line each. See docs/embed.md.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "engine.hpp"
#include "manifest.hpp"
#include "picture.hpp"

namespace fs = std::filesystem;

namespace {

constexpr const char* kUsage =
    "usage: classify-ENGINE MODEL PICTURE... [--maps FOLDER] [--target INDEX] [--threads N] [--json]\n"
    "\n"
    "Class and probability of each picture.\n"
    "  --maps FOLDER   also write what the class depends on, as FOLDER/PICTURE.pfm (float32, of the model's size)\n"
    "  --target INDEX  explain this class (default: the predicted one)\n"
    "  --threads N     of one inference (default: 1)\n"
    "  --json          one JSON object a line, with the logits\n"
    "\n"
    "  classify-openvino model.onnx photo.png --maps maps/\n";

struct Options {
    std::string model, maps;
    std::vector<std::string> pictures;
    std::int64_t target = -1;
    int threads = 1;
    bool json = false;
};

long whole_number(const std::string& name, const char* text, long least) {
    char* end = nullptr;
    const long value = text ? std::strtol(text, &end, 10) : 0;
    if (!text || !*text || *end || value < least || value > 1 << 20)
        throw std::runtime_error(name + " " + (text ? text : "") + ": expected a whole number from " +
                                 std::to_string(least));
    return value;
}

Options parse(char** arguments) {
    Options options;
    std::vector<std::string> names;
    for (; *arguments; arguments++) {
        const std::string word = *arguments;
        const auto next = [&] { return *(arguments + 1) ? *++arguments : nullptr; };
        if (word == "--json")
            options.json = true;
        else if (word == "--target")
            options.target = whole_number(word, next(), 0);
        else if (word == "--threads")
            options.threads = int(whole_number(word, next(), 1));
        else if (word == "--maps") {
            const char* folder = next();
            if (!folder) throw std::runtime_error("--maps: expected a folder");
            options.maps = folder;
        } else if (word.rfind("--", 0) == 0)
            throw std::runtime_error(word + ": no such option; see --help");
        else
            names.push_back(word);
    }
    if (names.size() < 2) throw std::runtime_error("expected a model and a picture at least; see --help");
    options.model = names.front();
    options.pictures.assign(names.begin() + 1, names.end());
    std::set<std::string> files;
    for (const auto& picture : options.pictures)
        if (!options.maps.empty() && !files.insert(fs::path(picture).filename().string()).second)
            throw std::runtime_error(picture + ": another picture has this name, and so would its map; rename it");
    return options;
}

// Portable float map: three lines of text, then rows of little-endian float32 from the bottom up.
void write_map(const fs::path& path, const Answer& answer) {
    fs::path partial = path;
    partial += ".partial";
    std::ofstream file(partial, std::ios::binary);
    file << "Pf\n" << answer.width << " " << answer.height << "\n-1.0\n";
    for (std::size_t row = answer.height; row-- > 0;)
        file.write(reinterpret_cast<const char*>(&answer.map[row * answer.width]),
                   std::streamsize(answer.width * sizeof(float)));
    file.close();
    if (!file) throw std::runtime_error(path.string() + ": cannot be written; check folder and space");
    fs::rename(partial, path);
}

void classify(const Options& options) {
    if (!fs::is_regular_file(options.model)) throw std::runtime_error(options.model + ": no such file; check the path");
    std::unique_ptr<Engine> engine;
    Manifest manifest;
    std::string map_output;
    try {
        engine = open_engine(options.model, options.threads);
        manifest = read_manifest(engine->manifest());
        if (!options.maps.empty()) {
            map_output = engine->has_output("saliency") ? "saliency" : manifest.cams.empty() ? "" : manifest.cams[0];
            if (map_output.empty()) throw std::runtime_error("gives classes only; leave --maps out");
            fs::create_directories(options.maps);
        }
        if (options.target >= std::int64_t(manifest.classes.size()))
            throw std::runtime_error("has " + std::to_string(manifest.classes.size()) + " classes, --target is " +
                                     std::to_string(options.target));
        engine->prepare(map_output);
    } catch (const std::exception& error) {
        throw std::runtime_error(options.model + ": " + error.what());
    }
    for (const auto& picture : options.pictures) {
        const auto answer = engine->run(load_picture(picture, manifest), options.target);
        for (float logit : answer.logits)
            if (!std::isfinite(logit)) throw std::runtime_error(picture + ": the model gives logits that are not finite");
        if (answer.logits.size() != manifest.classes.size())
            throw std::runtime_error(options.model + ": its logits are not as many as its classes; export it again");
        const auto probabilities = softmax(answer.logits, manifest.temperature);
        const auto best = std::max_element(probabilities.begin(), probabilities.end()) - probabilities.begin();
        std::string map;
        if (!map_output.empty()) {
            for (float value : answer.map)
                if (!std::isfinite(value)) throw std::runtime_error(picture + ": the model gives maps that are not finite");
            map = (fs::path(options.maps) / fs::path(picture).filename()).string() + ".pfm";
            write_map(map, answer);
        }
        if (!options.json) {
            std::printf("%s  %s  %.4f%s%s\n", picture.c_str(), manifest.classes[best].c_str(), probabilities[best],
                        map.empty() ? "" : "  ", map.c_str());
            continue;
        }
        nlohmann::json line = {{"path", picture}, {"class", manifest.classes[best]}, {"index", best},
                               {"probability", probabilities[best]}, {"logits", answer.logits}};
        if (!map.empty()) line["map"] = map;
        std::cout << line.dump() << "\n";
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 2 && !std::strcmp(arguments[1], "--help")) {
        std::cout << kUsage;
        return 0;
    }
    try {
        classify(parse(arguments + 1));
        return 0;
    } catch (const std::exception& error) {  // one line: engines say several, the last of which is the reason
        std::string text = error.what();
        while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.pop_back();
        for (char& letter : text)
            if (letter == '\n') letter = ' ';
        std::cerr << "classify: " << text << "\n";
        return 2;
    }
}
