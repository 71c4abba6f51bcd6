#include <onnxruntime_cxx_api.h>

#include "engine.hpp"
#include "processor.hpp"

namespace {

class ORTEngine : public Engine {
public:
    ORTEngine(const std::string& path, int threads) : environment_(ORT_LOGGING_LEVEL_ERROR, "classify") {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(threads);
        options.SetInterOpNumThreads(1);
        if (!adds_in_int32())  // weights become u8 then, whose products are added in 32 bits
            options.AddConfigEntry("session.x64quantprecision", "1");
        session_ = Ort::Session(environment_, path.c_str(), options);
    }

    std::string manifest() override {
        Ort::AllocatorWithDefaultOptions allocator;
        auto text = session_.GetModelMetadata().LookupCustomMetadataMapAllocated("clearpact", allocator);
        return text ? text.get() : "";
    }

    bool has_output(const std::string& name) override {
        Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t i = 0; i < session_.GetOutputCount(); i++)
            if (name == session_.GetOutputNameAllocated(i, allocator).get()) return true;
        return false;
    }

    void prepare(const std::string& map_output) override {
        map_output_ = map_output;
        takes_target_ = session_.GetInputCount() > 1;
        shape_ = session_.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
        shape_[0] = 1;
    }

    Answer run(const std::vector<std::uint8_t>& pixels, std::int64_t target) override {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const std::int64_t one = 1;
        std::vector<Ort::Value> given;
        given.push_back(Ort::Value::CreateTensor<std::uint8_t>(memory, const_cast<std::uint8_t*>(pixels.data()),
                                                               pixels.size(), shape_.data(), shape_.size()));
        if (takes_target_) given.push_back(Ort::Value::CreateTensor<std::int64_t>(memory, &target, 1, &one, 1));
        const char* inputs[] = {"image", "target"};
        const char* outputs[] = {"logits", map_output_.c_str()};
        const auto found = session_.Run(Ort::RunOptions{}, inputs, given.data(), given.size(), outputs,
                                        map_output_.empty() ? 1 : 2);
        const auto floats = [](const Ort::Value& value) {
            const float* data = value.GetTensorData<float>();
            return std::vector<float>(data, data + value.GetTensorTypeAndShapeInfo().GetElementCount());
        };
        Answer answer;
        answer.logits = floats(found[0]);
        if (found.size() > 1) {
            const auto shape = found[1].GetTensorTypeAndShapeInfo().GetShape();
            answer.map = floats(found[1]);
            answer.height = shape[1], answer.width = shape[2];
        }
        return answer;
    }

private:
    Ort::Env environment_;
    Ort::Session session_{nullptr};
    std::string map_output_;
    bool takes_target_ = false;
    std::vector<std::int64_t> shape_;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const std::string& path, int threads) {
    return std::make_unique<ORTEngine>(path, threads);
}
