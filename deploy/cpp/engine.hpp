// What the two programs differ in: how a model file is opened and run.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct Answer {
    std::vector<float> logits;  // [K]
    std::vector<float> map;     // [h, w], >= 0; empty where none was asked for
    std::size_t height = 0, width = 0;
};

// A model file on one engine, for one picture at a time.
class Engine {
public:
    virtual ~Engine() = default;
    // The JSON text in the file's metadata_props["clearpact"]; empty where there is none.
    virtual std::string manifest() = 0;
    virtual bool has_output(const std::string& name) = 0;
    // Make ready for `logits` and, unless its name is empty, one map. Call it once, before `run`.
    virtual void prepare(const std::string& map_output) = 0;
    // Classify pixels [H, W, C] and explain `target`; -1 is the predicted class.
    virtual Answer run(const std::vector<std::uint8_t>& pixels, std::int64_t target) = 0;
};

// Throws std::exception where the engine cannot read the file.
std::unique_ptr<Engine> open_engine(const std::string& path, int threads);
