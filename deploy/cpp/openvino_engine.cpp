#include <algorithm>
#include <iostream>
#include <openvino/openvino.hpp>

#include "engine.hpp"
#include "processor.hpp"

namespace {

class OpenVINOEngine : public Engine {
public:
    OpenVINOEngine(const std::string& path, int threads) : model_(core_.read_model(path)), threads_(threads) {
        if (!adds_in_int32())
            std::cerr << "classify: this processor adds products of codes in 16 bits, where OpenVINO may lose the last "
                         "bit of signed codes; classify-ort does not\n";
    }

    std::string manifest() override {
        // Where OpenVINO keeps the metadata_props of an ONNX file.
        if (!model_->has_rt_info("framework", "clearpact")) return "";
        return model_->get_rt_info<std::string>("framework", "clearpact");
    }

    bool has_output(const std::string& name) override {
        for (const auto& output : model_->outputs())
            if (output.get_names().count(name)) return true;
        return false;
    }

    void prepare(const std::string& map_output) override {
        // What only other outputs need is neither compiled nor computed. Every run has the static shape of one
        // picture: some graphs are computed wrongly where the batch is open.
        ov::OutputVector wanted{model_->output("logits")};
        if (!map_output.empty()) wanted.push_back(model_->output(map_output));
        auto chosen = std::make_shared<ov::Model>(wanted, model_->get_parameters());
        std::map<std::string, ov::PartialShape> shapes;
        for (const auto& input : chosen->inputs()) {
            auto shape = input.get_partial_shape();
            shape[0] = 1;
            shapes[input.get_any_name()] = shape;
        }
        chosen->reshape(shapes);
        // Floats stay float32: in bfloat16 the residual sums would miss codes.
        auto compiled = core_.compile_model(
            chosen, "CPU", ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
            ov::hint::inference_precision(ov::element::f32), ov::inference_num_threads(threads_),
            ov::hint::enable_cpu_pinning(false));
        request_ = compiled.create_infer_request();
        for (const auto& input : compiled.inputs()) takes_target_ |= input.get_names().count("target") > 0;
        explains_ = !map_output.empty();
        model_.reset();
    }

    Answer run(const std::vector<std::uint8_t>& pixels, std::int64_t target) override {
        auto image = request_.get_tensor("image");
        std::copy(pixels.begin(), pixels.end(), image.data<std::uint8_t>());
        if (takes_target_) *request_.get_tensor("target").data<std::int64_t>() = target;
        request_.infer();
        Answer answer;
        const auto logits = request_.get_output_tensor(0);
        answer.logits.assign(logits.data<float>(), logits.data<float>() + logits.get_size());
        if (explains_) {
            const auto map = request_.get_output_tensor(1);
            answer.map.assign(map.data<float>(), map.data<float>() + map.get_size());
            answer.height = map.get_shape()[1], answer.width = map.get_shape()[2];
        }
        return answer;
    }

private:
    ov::Core core_;
    std::shared_ptr<ov::Model> model_;
    int threads_;
    ov::InferRequest request_;
    bool takes_target_ = false, explains_ = false;
};

}  // namespace

std::unique_ptr<Engine> open_engine(const std::string& path, int threads) {
    return std::make_unique<OpenVINOEngine>(path, threads);
}
